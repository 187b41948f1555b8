"""What a method is: the protocol that every file of this folder fulfils."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from typing import Any, ClassVar, Protocol, TypeGuard, runtime_checkable

from torch import Tensor, nn

from learngene_hub.data import Images
from learngene_hub.errors import ShapeError
from learngene_hub.learngene import Learngene
from learngene_hub.shape import Preprocessing, Shape, ViTShape
from learngene_hub.teacher import Teacher
from learngene_hub.training import StateDir, Step


@runtime_checkable
class Method(Protocol):
    """One published method: a frozen dataclass whose fields are its settings, each with a comment at the end of its
    line that says what it is: `learngene methods NAME` prints it.

    ``expand`` is pure and differentiable: it maps the learngene's tensors to the state dict of the timm model of
    ``shape``, and ``None`` marks what stays at its fresh initialisation. It returns every key of that model.

    A method may declare ``growth``, a ClassVar with the names of the settings that act when a learngene grows: any
    other is then refused there. Without it all are taken.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    groups: ClassVar[frozenset[str]]

    def extract(
        self,
        ancestor: nn.Module,
        data: Mapping[str, Images],
        *,
        facts: Mapping[str, Any],
        preprocessing: Preprocessing,
        watch: Callable[[Iterator[Step]], Iterator[Step]],
    ) -> Learngene:
        """The learngene of ``ancestor`` (a timm ViT), found with the images of ``data`` (name -> images).

        ``watch`` is handed the steps of every training loop and passes them on: a progress bar, a log.
        """
        ...

    def expand(self, learngene: Learngene, shape: Any) -> dict[str, Tensor | None]:
        """Every entry of the state dict of ``shape``; None marks what stays fresh.

        ``shape`` is a ViTShape, unless the method plans shapes of its own (``Planning``).
        """
        ...

    def check(self, shapes: Mapping[str, tuple[int, ...]], native: Any) -> None:
        """Refuse tensors that a learngene of this method and native shape cannot hold (ArtefactError).

        ``native`` is a ViTShape, unless the method plans shapes of its own: then it is whatever kind the file says.
        """
        ...


class Planning(Method, Protocol):
    """A method with its own rule of which descendants there are, of whatever kind of shape.

    It is one by declaring ``plan``. Any other grows plain ViTs of each depth and width within reach.
    """

    def plan(
        self,
        learngene: Learngene,
        *,
        depth: int | None,
        width: int | None,
        heads: int | tuple[int, ...] | None,
        num_labels: int | None,
        image_size: int | None,
        in_chans: int,
    ) -> Shape:
        """The shape grown with these sizes, each None (left out) or at least 1; checked, nothing allocated.

        ``heads`` is one number for all blocks, or one for each. Budgets are kept by the factory, which asks for one
        size after the other.

        Raises:
            ShapeError: a size that these learngenes have no descendant of; the message names what they have.
        """
        ...


def is_planning(method: Method) -> TypeGuard[Planning]:
    """Whether the method declares ``plan``."""
    return callable(getattr(method, "plan", None))


class Listing(Planning, Protocol):
    """A planning method whose descendants are so many networks, of which several may have one depth and one width.

    It is one by declaring ``descendants``.
    """

    def descendants(self, learngene: Learngene) -> list[tuple[dict[str, Any], float | None]]:
        """Of each descendant the growth settings that ``plan`` finds it by, and its measured accuracy, per cent."""
        ...


def is_listing(method: Method) -> TypeGuard[Listing]:
    """Whether the method declares ``descendants``."""
    return callable(getattr(method, "descendants", None))


class Resumable(Method, Protocol):
    """A method whose extraction goes on where it was interrupted.

    It is one by declaring ``state_dir``; a method that does not is called without it, and starts again.
    """

    def extract(
        self,
        ancestor: nn.Module,
        data: Mapping[str, Images],
        *,
        facts: Mapping[str, Any],
        preprocessing: Preprocessing,
        watch: Callable[[Iterator[Step]], Iterator[Step]],
        state_dir: StateDir | None = None,
    ) -> Learngene:
        """As ``Method.extract``. ``state_dir`` is the caller's folder and the identity of this extraction, for ``fit``.

        What lies there is of the same method, settings, ancestor and data, or ``fit`` refuses it.
        """
        ...


def is_resumable(method: Method) -> TypeGuard[Resumable]:
    """Whether the method's ``extract`` declares ``state_dir``."""
    return "state_dir" in signature(method.extract).parameters


class Taught(Method, Protocol):
    """A method whose auxiliary learns from what a teacher says: the ancestor, or another model beside it.

    It is one by declaring ``teacher``; a method that does not is refused one.
    """

    def extract(
        self,
        ancestor: nn.Module,
        data: Mapping[str, Images],
        *,
        facts: Mapping[str, Any],
        preprocessing: Preprocessing,
        watch: Callable[[Iterator[Step]], Iterator[Step]],
        teacher: Teacher | None = None,
    ) -> Learngene:
        """As ``Method.extract``. The ancestor gives sizes and first weights, ``teacher`` (None: it too) the logits."""
        ...


def is_taught(method: Method | type) -> TypeGuard[Taught]:
    """Whether the method's ``extract`` declares ``teacher``."""
    return "teacher" in signature(method.extract).parameters


def require_ancestor(method: Method, ancestor: nn.Module) -> None:
    """Nothing, where the method can begin with this ancestor, as far as can be told without data.

    A method says so by declaring ``require_ancestor(ancestor)``; any other needs a plain ViT.

    Raises:
        ShapeError: it cannot.
    """
    declared = getattr(method, "require_ancestor", None)
    if declared is not None:
        declared(ancestor)
        return
    try:
        ViTShape.of(ancestor)
    except ShapeError as error:
        raise ShapeError(f"{method.name} needs a plain ViT as ancestor: {error}") from error


class Tuned(Protocol):
    """A module (images -> logits) that is trained in place of a descendant, and becomes one."""

    def materialise(self) -> nn.Module:
        """The plain timm model that it is now, with parameters of its own."""
        ...


class Constrainable(Method, Protocol):
    """A method whose descendants can be trained through what its learngenes are made of, by declaring this."""

    def constrained(self, learngene: Learngene, shape: Any, *, seed: int = 0) -> Tuned:
        """A descendant of ``shape`` whose parameters are the learngene's, and a fresh head drawn with ``seed``."""
        ...


def is_constrainable(method: Method | type) -> TypeGuard[Constrainable]:
    """Whether the method declares ``constrained``."""
    return callable(getattr(method, "constrained", None))
