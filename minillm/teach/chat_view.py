"""A chat in the notebook: the view of a `minillm.infer.conversation.Conversation`.

    chat_view(Conversation(model, tokenizer, reward=reward_model))

Pieces appear as they come; the slider sets the temperature of the next answer, Stop ends the one
that is being given, and below each answer stands what the reward model thinks of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import html
from collections.abc import Sequence

from minillm.infer.conversation import Answer, Conversation
from minillm.teach import plots

PAUSE = 0.001  # seconds after each piece in which the notebook is heard: Stop, the slider
_BUBBLE = (
    '<div style="margin:6px 0 0 {indent}px;padding:6px 12px;border-left:4px solid {color};'
    'white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.4"><b>{who}</b>&ensp;{text}</div>'
)
_NOTE = '<div style="margin:0 0 8px 44px;font-size:85%;color:{color}">{text}</div>'


def transcript(
    messages: Sequence[tuple[str, str]], answers: Sequence[Answer], forgotten: int = 0
) -> str:
    """A conversation as HTML: who said what, and below each answer what is known of it.

    The first `forgotten` messages, which the model no longer reads, are marked. A message of the
    user that is still unanswered may stand at the end, and what has come of the answer behind it.
    What was said is text: markup in it is shown, not obeyed.
    """
    parts, told = [], iter(answers)
    for i, (role, content) in enumerate(messages):
        mine = role == "user"
        color = plots.MUTED if i < forgotten else plots.COLORS[0 if mine else 1]
        text = html.escape(content) or "<i>(nothing)</i>"
        who = "you" if mine else "model"
        parts.append(_BUBBLE.format(indent=0 if mine else 30, color=color, who=who, text=text))
        if not mine and (answer := next(told, None)) is not None:
            parts.append(_NOTE.format(color=plots.MUTED, text=html.escape(str(answer))))
        if i == forgotten - 1:
            parts.append(_NOTE.format(color=plots.MUTED, text="— forgotten up to here —"))
    return "".join(parts)


class ChatView:
    """Controls over a conversation; made by `chat_view`, displays itself."""

    def __init__(self, conversation: Conversation, first: str = "") -> None:
        import ipywidgets as w

        self.conversation, self._stopped, self._task = conversation, False, None
        self.text = w.Text(value=first, placeholder="say something")
        self.send = w.Button(description="Send", button_style="primary")
        self.stop = w.Button(description="Stop", disabled=True)
        self.reset = w.Button(description="Forget all")
        look = {"description": "temperature", "style": {"description_width": "90px"}}
        heat = max(2.0, conversation.temperature)
        self.temperature = w.FloatSlider(conversation.temperature, max=heat, step=0.05, **look)
        self.html = w.HTML()
        self.text.layout.width, self.html.layout.width = "55%", "98%"
        self.send.on_click(lambda _: self.say())
        # on Enter; a change of the value would also come when the text is merely left
        self.text.on_msg(lambda _, sent, __: self.say() if sent.get("event") == "submit" else None)
        self.stop.on_click(lambda _: self.end())
        self.reset.on_click(lambda _: (conversation.reset(), self._draw()))
        self.temperature.observe(
            lambda change: setattr(conversation, "temperature", change["new"]), names="value"
        )
        below = w.HBox([self.temperature, self.reset])
        self.box = w.VBox([self.html, w.HBox([self.text, self.send, self.stop]), below])
        self._draw()

    def say(self) -> None:
        """Say what stands in the line, and show the answer as it comes.

        Where there is a running loop (a notebook), the answer is a task of it, so that Stop is
        heard in between; elsewhere it is finished on return.
        """
        if self.stop.disabled and self.text.value.strip():
            text, self.text.value = self.text.value, ""
            self._stopped, self.stop.disabled = False, False
            self.send.disabled = self.reset.disabled = True
            try:
                self._task = asyncio.get_running_loop().create_task(self._answer(text))
            except RuntimeError:
                asyncio.run(self._answer(text))

    def end(self) -> None:
        """Stop the answer that is being given; what has come of it stays."""
        self._stopped = True

    async def _answer(self, text: str) -> None:
        problem, said = "", ""
        try:
            with contextlib.closing(self.conversation.say(text)) as pieces:
                self._draw([("user", text)])
                for piece in pieces:
                    said += piece
                    self._draw([("user", text), ("assistant", said)])
                    await asyncio.sleep(PAUSE)
                    if self._stopped:
                        break
        except ValueError as error:
            problem, self.text.value = str(error), text
        finally:
            self.stop.disabled, self.send.disabled, self.reset.disabled = True, False, False
            self._draw(problem=problem)

    def _draw(self, more: Sequence[tuple[str, str]] = (), problem: str = "") -> None:
        talk = self.conversation
        shown = transcript([*talk.messages, *more], talk.answers, talk.forgotten)
        self.html.value = shown + _NOTE.format(color=plots.COLORS[1], text=html.escape(problem))

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, object]:
        widget = self.box._repr_mimebundle_() or {}
        static = self.html.value or "<i>A chat; it needs a running kernel.</i>"
        return {**widget, "text/html": static, "text/plain": "a chat"}


def chat_view(conversation: Conversation, first: str = "") -> ChatView:
    """A line to type in, and above it what was said; `first` stands in the line already.

    Tag the cell `nbval-ignore-output`. A page without a kernel shows what was said until then.
    """
    return ChatView(conversation, first)
