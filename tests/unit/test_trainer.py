"""Trainers of users: derived from Trainer or not, with or without the optional methods."""

from __future__ import annotations

from orchestrator.worker.trainer import Trainer, WithDefaults


class Derived(Trainer):
    def train(self, work, should_stop, on_epoch):
        return work

    def save(self, target):
        target.append("saved")


class Plain:
    def __init__(self):
        self.saw = []

    def train(self, work, should_stop, on_epoch):
        return work

    def save(self, target):
        target.append("saved")

    def judged(self, promoted):
        self.saw.append(promoted)


def test_a_derived_trainer_inherits_the_optional_methods():
    trainer = Derived()
    assert isinstance(trainer, Trainer)
    assert trainer.judged(True) is None
    assert trainer.close() is None


def test_a_trainer_that_is_not_derived_keeps_its_methods_and_gets_those_that_it_lacks():
    plain = Plain()
    assert not isinstance(plain, Trainer)
    trainer = WithDefaults(plain)
    saved = []
    trainer.save(saved)
    trainer.judged(True)
    trainer.close()
    assert (trainer.train("work", None, None), saved, plain.saw) == ("work", ["saved"], [True])
