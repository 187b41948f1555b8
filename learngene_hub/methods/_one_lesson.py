"""What tleg and sws share: an auxiliary that is trained in one lesson, from beginning to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from learngene_hub.data import Images
from learngene_hub.learngene import Learngene
from learngene_hub.methods import _auxiliary, _lesson
from learngene_hub.methods._distillation import ResizedDistillation
from learngene_hub.shape import Preprocessing, ViTShape
from learngene_hub.teacher import Teacher
from learngene_hub.training import StateDir, Step


@dataclass(frozen=True, kw_only=True)
class OneLesson(ResizedDistillation):
    """The settings of a method that says how its auxiliary begins."""

    name: ClassVar[str]

    def begin(
        self, native: ViTShape, ancestor: nn.Module | None, facts: Mapping[str, Any], preprocessing: Preprocessing
    ) -> _auxiliary.Auxiliary:
        """The auxiliary of shape ``native`` before training; the ancestor is asked where ``start`` says so."""
        raise NotImplementedError

    def require_ancestor(self, ancestor: nn.Module) -> None:
        """Refuse an ancestor that lacks what is to be its own (ShapeError)."""
        _lesson.require_ancestor(self, ancestor, self.blocks)

    def extract(
        self,
        ancestor: nn.Module,
        data: Mapping[str, Images],
        *,
        facts: Mapping[str, Any],
        preprocessing: Preprocessing,
        watch: Callable[[Iterator[Step]], Iterator[Step]] = iter,
        state_dir: StateDir | None = None,
        teacher: Teacher | None = None,
    ) -> Learngene:
        """The learngene of an auxiliary that learns from ``teacher`` (the ancestor) on all images of ``data``, of one
        size.

        The native shape is the auxiliary's, at the size of the images. ``ancestor`` is any model with logits; a plain
        ViT where the auxiliary's sizes or first weights are to be its own.

        Raises:
            SettingsError: no data, or settings that the data or the teacher do not allow.
            DataError: images of different sizes, of other channels than the teacher's, or none.
            ShapeError: no such auxiliary, or the ancestor is no plain ViT where something is to be its own.
        """
        lesson = _lesson.prepare(
            self, ancestor, data, depth=self.blocks, method=self.name, preprocessing=preprocessing, teacher=teacher
        )
        auxiliary = self.begin(lesson.native, ancestor, facts, preprocessing)
        lesson.ask(state_dir)
        log = _lesson.train(auxiliary, lesson, self.recipe(), watch, state_dir)
        return auxiliary.learngene(_lesson.report(lesson, [log]), head=self.head == "inherit")
