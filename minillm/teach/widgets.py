"""Controls over pure views, with a picture that stays where there is no kernel.

    def view(width: int = 64, scaled: bool = True) -> Figure: ...
    widgets.explore(view, width=(4, 1024, 4), scaled=[True, False])

`view` turns values into a matplotlib figure and is tested on its own. What is displayed carries
two forms: the live widget, and the figure at the values it started with (`image/png`), which a
page without a kernel shows. Tag such a cell `nbval-ignore-output`.
"""

from __future__ import annotations

import asyncio
import base64
import html
import inspect
import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from minillm.teach.viewers import (
    as_array,
    attention_figure,
    compare_tokens,
    token_html,
)

__all__ = [
    "Exploration",
    "attention_figure",
    "attention_view",
    "explore",
    "png",
    "token_html",
    "token_view",
]
DELAY = 0.05  # seconds in which further moves of a slider are folded into one redraw


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, at its own dpi; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi)
    plt.close(figure)
    return buffer.getvalue()


class Exploration:
    """A view with its controls; made by `explore`, displays itself.

    `values()` are the present settings, `image` is the `ipywidgets.Image`, `controls` the widgets
    by name, `static` the PNG at the first settings.
    """

    def __init__(self, view: Callable[..., Figure], controls: Mapping[str, object]) -> None:
        import ipywidgets

        if not controls:
            raise ValueError("explore needs at least one control, such as width=(1, 10)")
        self.view = view
        self.controls = {
            name: _control(name, spec, _default(view, name)) for name, spec in controls.items()
        }
        self._pending = False
        self.static = png(view(**self.values()))
        self.image = ipywidgets.Image(value=self.static, format="png")
        self.image.layout.max_width = "100%"
        self.message = ipywidgets.HTML()
        for control in self.controls.values():
            control.observe(self._moved, names="value")
        left = ipywidgets.Layout(align_items="flex-start")  # stretched, the picture would blur
        self.box = ipywidgets.VBox([*self.controls.values(), self.message, self.image], layout=left)

    def values(self) -> dict[str, object]:
        """The present value of every control."""
        return {name: control.value for name, control in self.controls.items()}

    def redraw(self) -> None:
        """Draw the view at the present values; a ValueError of the view is shown as its message."""
        self._pending = False
        try:
            self.image.value = png(self.view(**self.values()))
            self.message.value = ""
        except ValueError as error:
            self.message.value = f'<span style="color:#D55E00">{html.escape(str(error))}</span>'

    def _moved(self, _change: object) -> None:
        # Moves that arrive while one redraw waits are folded into it. Outside of a running loop
        # (a script, a test) there is nobody to wait for.
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.redraw()
            return
        if not self._pending:
            self._pending = True
            loop.call_later(DELAY, self.redraw)

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, object]:
        widget = self.box._repr_mimebundle_() or {}
        names = ", ".join(self.controls)
        return {
            **widget,
            "image/png": base64.b64encode(self.static).decode("ascii"),
            "text/plain": f"interactive figure over {names}",
        }


def explore(view: Callable[..., Figure], **controls: object) -> Exploration:
    """Put controls over a pure view.

    A control is a tuple (low, high) or (low, high, step): a slider, of whole numbers if all of
    them are; a list or a mapping label -> value: a choice; a bool: a check box; a str: a line of
    text; or an ipywidget. It starts at the default of the view's parameter of that name, else at
    the low end or the first choice.

    Raises ValueError for a name that `view` does not take and for a control of another kind.
    """
    parameters = inspect.signature(view).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in controls if name not in parameters and not takes_all]
    if unknown:
        raise ValueError(f"the view takes {list(parameters)}, so it cannot be given {unknown}")
    return Exploration(view, controls)


def _default(view: Callable, name: str) -> object:
    parameter = inspect.signature(view).parameters.get(name)
    return inspect.Parameter.empty if parameter is None else parameter.default


def _control(name: str, spec: object, default: object):
    import ipywidgets

    given = default is not inspect.Parameter.empty
    look = {"description": name.replace("_", " "), "style": {"description_width": "110px"}}
    if isinstance(spec, ipywidgets.ValueWidget):
        return spec
    if isinstance(spec, bool):
        return ipywidgets.Checkbox(value=default if given else spec, **look)
    if isinstance(spec, str):
        return ipywidgets.Text(value=default if given else spec, **look)
    if isinstance(spec, tuple) and len(spec) in (2, 3) and spec[0] <= spec[1]:
        low, high = spec[:2]
        whole = all(isinstance(number, int) for number in spec)
        step = spec[2] if len(spec) == 3 else (1 if whole else (high - low) / 100)
        kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
        wide = ipywidgets.Layout(width="420px", max_width="100%")
        start = default if given else low
        if not low <= start <= high:
            raise ValueError(f"{name}={start}, the view's default, must lie in [{low}, {high}]")
        return kind(value=start, min=low, max=high, step=step, layout=wide, **look)
    if isinstance(spec, list | Mapping) and len(spec) > 0:
        options = list(spec.items()) if isinstance(spec, Mapping) else spec
        choices = [value for _, value in options] if isinstance(spec, Mapping) else spec
        start = default if given else choices[0]
        if start not in choices:
            raise ValueError(f"{name}={start!r}, the view's default, must be one of {choices}")
        return ipywidgets.Dropdown(options=options, value=start, **look)
    raise ValueError(
        f"{name}={spec!r} is no control: give (low, high[, step]), a list, a mapping, a bool, "
        "a str or an ipywidget"
    )


def attention_view(weights: object, tokens: Sequence[str], title: str | None = None) -> Exploration:
    """Attention maps by layer and head.

    weights: [layers, heads, t, s], or a mapping from the name of a mask to such weights, which
    adds a choice of mask; tokens: the s keys as text.
    """
    by_mask = dict(weights) if isinstance(weights, Mapping) else {"": weights}
    arrays = {name: as_array(value) for name, value in by_mask.items()}
    shapes = {name: array.shape for name, array in arrays.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"the weights under each mask must have one shape, got {shapes}")
    layers, heads = next(iter(shapes.values()))[:2]
    first = next(iter(arrays))

    def view(layer: int = 0, head: int = 0, mask: str = first) -> Figure:
        parts = [title, f"layer {layer}, head {head}", mask]
        caption = ", ".join(part for part in parts if part)
        return attention_figure(arrays[mask], tokens, layer, head, title=caption)

    controls: dict[str, object] = {}
    if layers > 1:
        controls["layer"] = (0, layers - 1)
    if heads > 1 or layers == 1:
        controls["head"] = (0, heads - 1)
    if len(arrays) > 1:
        controls["mask"] = list(arrays)
    return explore(view, **controls)


class TokenView:
    """Typed text as colored tokens under several tokenizers; made by `token_view`."""

    def __init__(self, tokenizers: Mapping[str, object], text: str) -> None:
        import ipywidgets

        self.tokenizers = dict(tokenizers)
        self.static = compare_tokens(self.tokenizers, text)
        wide = ipywidgets.Layout(width="98%", height="90px")
        self.text = ipywidgets.Textarea(value=text, layout=wide, continuous_update=True)
        self.html = ipywidgets.HTML(value=self.static)
        self.text.observe(self._typed, names="value")
        self.box = ipywidgets.VBox([self.text, self.html])

    def _typed(self, _change: object) -> None:
        try:
            self.html.value = compare_tokens(self.tokenizers, self.text.value)
        except ValueError as error:
            self.html.value = f'<span style="color:#D55E00">{html.escape(str(error))}</span>'

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, object]:
        widget = self.box._repr_mimebundle_() or {}
        names = ", ".join(self.tokenizers)
        return {**widget, "text/html": self.static, "text/plain": f"tokens under {names}"}


def token_view(tokenizers: object, text: str) -> TokenView:
    """A text box over its tokens: `tokenizers` is one tokenizer or a mapping from names to them.

    A tokenizer is what `minillm.teach.viewers.pieces` takes: an object with `encode`, a function
    from text to pieces, or pieces cut already (which then stay as they are).
    """
    named = tokenizers if isinstance(tokenizers, Mapping) else {"tokens": tokenizers}
    return TokenView(named, text)
