"""An adapter's configuration from a stranger: one message, no traceback, no hang."""

import contextlib
import json
import re
import time

import pytest

from qlora_neft.adapter.config_schema import check_adapter_config
from qlora_neft.adapter.folder import CONFIG, WEIGHTS, find_adapter
from qlora_neft.errors import UserInputError
from qlora_neft.run_folder.record import RunSummary

SOUND = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "ann/base",
    "lora_dropout": 0.05,
    "init_lora_weights": True,
}
BAD = {
    "r": ["8", 10**9, 0, -1, 8.5, None, True, [8]],
    "lora_alpha": ["16", float("nan"), float("inf"), -1, 1e300, None],
    "lora_dropout": ["0", 2, -0.1, float("nan")],
    "target_modules": [5, {"a": 1}, [1], "(a+)+$", "(a|a)*b", "((x*)*)*y", "(.*a){20}", ".*" * 30, "(", "a" * 10_000],
    "exclude_modules": ["(a+)+", 3],
    "rank_pattern": [{"(a+)+": 4}, {"q": 10**9}, {"q": "8"}, ["q"], 4],
    "alpha_pattern": [{"(x|x)+": 1}, {"q": -1}, "q"],
    "layers_pattern": ["(a*)*", ["(a+)+"]],
    "layers_to_transform": ["all", [1.5]],
    "layer_replication": [[[0, 10**9]], [[0, 4]] * 500, "x", [[1]], [[4, 0]]],
    "base_model_name_or_path": [["a"], 5, {"a": 1}, "a" * 10_000],
    "revision": [5, ["main"]],
    "modules_to_save": ["x", [1]],
    "init_lora_weights": [5, ["pissa"]],
    "use_rslora": ["yes"],
    "bias": [5],
}
PATTERNS = [  # that people write
    r".*\.layers\.(0|1|2)\.(self_attn|mlp)\.(q_proj|up_proj)",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:k_proj|v_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:(?:up_proj)))",
    r"model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    r"all-linear",
    r"^(?!.*lm_head).*proj$",
]


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_one_message_names_the_key(key, value):
    began = time.monotonic()
    with pytest.raises(UserInputError) as caught:
        check_adapter_config({**SOUND, key: value}, "theirs")
    assert f"{key} " in str(caught.value) and len(str(caught.value)) < 600
    assert time.monotonic() - began < 1


def test_all_problems_at_once():
    with pytest.raises(UserInputError, match=r"r should.*lora_alpha .*target_modules"):
        check_adapter_config({**SOUND, "r": "8", "lora_alpha": None, "target_modules": 4}, "theirs")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_people_write_is_accepted(pattern):
    check_adapter_config({**SOUND, "target_modules": pattern, "rank_pattern": {"q_proj": 4}}, "mine")


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+$", "([a-z]*)*$", "(x+x+)+y", r"(\w|\d)*#", "(.*a){20}"])
def test_what_is_refused_does_not_end(pattern):
    with pytest.raises(UserInputError, match="may not end"):
        check_adapter_config({**SOUND, "target_modules": pattern}, "theirs")
    assert re.compile(pattern)


OTHERS = [None, 5, "x", [], [1], {}, {"a": 1}, True, 1e400, {"rows": "x", "tokens": []}]


SECTIONS = {
    "recipe.yaml": ("model", "quantization", "lora", "neftune", "data", "train", "machine"),
    "summary.json": ("data", "base_sha256", "before", "after", "census", "hardware", "versions", "peak_memory"),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_records_with_sections_of_other_types(tmp_path, name):
    (tmp_path / CONFIG).write_text(json.dumps(SOUND))
    (tmp_path / WEIGHTS).write_bytes(b"")
    for section in SECTIONS[name]:
        for value in OTHERS:
            (tmp_path / name).write_text(json.dumps({section: value}))  # JSON is YAML
            with contextlib.suppress(UserInputError):
                folder = find_adapter(tmp_path)
                read = [folder.base_revision, folder.quantization, folder.data, folder.census]
                assert folder.base and len(read) == 4 and RunSummary.of(folder.summary) is not None
