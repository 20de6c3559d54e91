"""A real run as `watch` sees it: under way, when it fails, resumed, and at its end."""

import json

import pytest
from command_line import make_workplace

from qlora_neft import load_recipe
from qlora_neft.runner.run import run
from qlora_neft.trainer import QLoRANeftTrainer
from qlora_neft.watch.clock import Clock
from qlora_neft.watch.run import WatchedRun


class Interrupted(Exception):
    pass


def test_a_run_tells_where_it_is_from_its_first_step_to_its_last(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(make_workplace(tmp_path / "place", llama))
    monkeypatch.setattr("qlora_neft.run_folder.live_record.LEAST_SECONDS", 0.0)
    recipe = load_recipe("mine.yaml", ["train.max_steps=8", "machine.save_steps=2", "machine.eval_steps=2"])
    out = tmp_path / "out"
    watched, seen = WatchedRun(out), {}

    class Looking(QLoRANeftTrainer):
        fails_at = 5

        def training_step(self, *args, **kwargs):
            seen[self.state.global_step] = watched.look(Clock())
            if self.state.global_step == self.fails_at:
                raise Interrupted("the power is gone")
            return super().training_step(*args, **kwargs)

    assert watched.look(Clock()).state == "waiting"
    with pytest.raises(Interrupted):
        run(recipe, out, quiet=True, trainer_class=Looking)
    assert [found.state for found in seen.values()] == ["training"] * 6
    assert [found.step for found in seen.values()] == [0, 1, 2, 3, 4, 5]
    assert all(found.steps == 8 for found in seen.values())
    assert seen[5].pace.seconds_left > 0
    assert seen[5].checkpoint_step == 4
    assert {"train", "held_out"} <= set(seen[5].losses)
    assert seen[5].memory["host_bytes"] > 0
    failed = watched.look(Clock())
    assert (failed.state, failed.note) == ("failed", "the power is gone")

    Looking.fails_at = None
    run(recipe, out, quiet=True, trainer_class=Looking)
    assert seen[4].state == "training"  # taken again, from the checkpoint
    lines = [json.loads(line) for line in (out / "live.jsonl").read_text().splitlines()]
    assert "failed" not in [line["phase"] for line in lines]  # it was beyond the checkpoint
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    phases = [line["phase"] for line in lines]
    assert phases[-2:] == ["measuring", "finished"]
    assert phases.count("evaluating") >= 4
    last = watched.look(Clock())
    assert (last.state, last.step, last.steps) == ("finished", 8, 8)
    assert WatchedRun(out).look(Clock()).losses == last.losses  # read at once, or bit by bit
