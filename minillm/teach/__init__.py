"""What only notebooks use: the doctor, shown source, one look for figures, widgets, checks, claims.

    from minillm.teach import check, claims, doctor, plots, show, widgets

Nothing is imported until it is asked for, so `python -m minillm.teach.doctor` also runs where half
of the course's packages are missing, which is when it is needed.
"""

from __future__ import annotations

import types


class CallableModule(types.ModuleType):
    """A module that can be called like the function that bears its name.

    `show` and `doctor` are each one function in a module of the same name. Notebooks want
    `from minillm.teach import show; show(f)`, tests want `from minillm.teach.show import Source`,
    and whichever is imported first must not change what the other one gets. A module does this by
    setting its own class, which Python supports ("Customizing module attribute access").
    """

    def __call__(self, *args, **kwargs):
        """Call the function of the same name as the module."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)
