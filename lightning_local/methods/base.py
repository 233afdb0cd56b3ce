"""The composition of the three axes; nothing of any paper is here."""

from __future__ import annotations

from lightning_local.couplings import Coupling, Isolated
from lightning_local.heads import Head
from lightning_local.losses import CrossEntropy, Loss

__all__ = ["LocalMethod"]


class LocalMethod:
    """A method of local learning: head x loss x coupling; any combination works.

    Args:
        head: The auxiliary network of every local module but the last.
        loss: What a local module minimises; default the task loss.
        coupling: What neighbours tell each other; default nothing.

    Attributes:
        head: The head; None if there are no local modules to give one to (`EndToEnd`).

    Raises:
        TypeError: An argument is not of its axis.

    Example:
        >>> from lightning_local import couplings, heads
        >>> method = LocalMethod(head=heads.Conv(), coupling=couplings.BackwardLink(weight=0.5))
    """

    def __init__(
        self,
        head: Head,
        loss: Loss | None = None,
        coupling: Coupling | None = None,
    ) -> None:
        for name, value, kind in (
            ("head", head, Head),
            ("loss", loss, Loss),
            ("coupling", coupling, Coupling),
        ):
            if not isinstance(value, kind) and (value is not None or name == "head"):
                raise TypeError(
                    f"{type(self).__name__}({name}={value!r}): pass an object from "
                    f"lightning_local.{name}{'es' if name == 'loss' else 's'}, an instance of "
                    f"{kind.__name__}."
                )
        self.head: Head | None = head
        self.loss = loss or CrossEntropy()
        self.coupling = coupling or Isolated()
