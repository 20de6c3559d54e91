"""generate: prompts in every form, answers that depend on the prompt alone, files and messages."""

import io
import json
import shutil
import sys
import types
import warnings

import pytest
import yaml
from command_line import HELD_OUT, ROWS, cut_off, invoke, never_stopped, refused
from talker import CONTEXT, save_talker
from transformers import Gemma3TextConfig, GenerationConfig, GPTNeoXConfig, LlamaConfig, OPTConfig

from qlora_neft.adapter.folder import find_adapter
from qlora_neft.adapter.load import load_trained, tokenizer_of_adapter
from qlora_neft.adapter.prompts import Prompts
from qlora_neft.data.examples import Dialogue, Instruction
from qlora_neft.data.prepare import prepare_data
from qlora_neft.errors import UserInputError
from qlora_neft.generation.answers import questions
from qlora_neft.generation.decode import Decoding, continuations, may_outrun_its_context
from qlora_neft.generation.generate import generate
from qlora_neft.generation.requests import Names, requests_of_file, requests_of_texts
from qlora_neft.recipe.schema import Data
from qlora_neft.runner.run_data import proof_rows

TEXTS = [f"Repeat {n}" + " please" * (n % 4) for n in range(6)]
SHORT = ("--max-new-tokens", "12")
SOME_WITHOUT = LlamaConfig()  # as Beam's: kinds of layers with rotary positions and without
SOME_WITHOUT.rope_parameters = {"sliding_attention": {"rope_type": "default"}, "full_attention": None}
TURN = [{"role": "user", "content": "Go"}]
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return str(save_talker(tmp_path_factory.mktemp("talker")))


@pytest.fixture(scope="module")
def trained(out):
    return load_trained(out, device="cpu", precision="fp32")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(*arguments):
    code, stdout, stderr = invoke("generate", *arguments)
    assert code == 0, stderr
    return stdout


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def json_lines(*arguments):
    return [json.loads(line) for line in asked(*arguments, "--json", *SHORT).splitlines()]


# ---- What an answer depends on ----


@pytest.mark.parametrize("drawing", [{}, {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 50, "seed": 3}])
def test_a_batch_of_unequal_prompts_answers_as_each_alone(trained, drawing):
    decoding = Decoding(max_new_tokens=20, repetition_penalty=1.3, **drawing)
    prompts = [trained.prompts.ids([{"role": "user", "content": text}]) for text in TEXTS]

    def answers(batch_size, pad):
        tokenizer = types.SimpleNamespace(pad_token_id=pad, eos_token_id=trained.tokenizer.eos_token_id)
        found = continuations(trained.model, tokenizer, prompts, decoding, batch_size=batch_size)
        return {answer.index: answer.ids for answer in found}

    alone = answers(1, trained.tokenizer.pad_token_id)
    assert len({tuple(ids) for ids in alone.values()}) > 1
    assert answers(4, trained.tokenizer.pad_token_id) == alone
    # A pad token that answers hold and prompts do not: a penalty on padding would show.
    held = sorted({i for ids in alone.values() for i in ids} - {i for prompt in prompts for i in prompt})
    assert len(held) >= 3
    for pad in held[:3]:
        assert answers(6, pad) == alone


def test_prompts_near_the_end_of_the_context_answer_together_as_each_alone(trained):
    texts = [f"Repeat {n}" + " please" * m for n, m in enumerate((106, 1, 111, 114))]
    prompts = [trained.prompts.ids([{"role": "user", "content": text}]) for text in texts]
    rooms = [min(CONTEXT - len(prompt), 60) for prompt in prompts]
    assert len(set(rooms)) == 4 and max(rooms) == 60

    def answers(batch_size, least=0):
        options = Decoding(60, min_new_tokens=least)
        found = continuations(trained.model, trained.tokenizer, prompts, options, batch_size=batch_size)
        return {answer.index: (answer.ids, answer.finish_reason) for answer in found}

    alone, held = answers(1), answers(1, 60)
    assert {reason for _, reason in alone.values()} == {"stop", "length"}
    assert [(len(ids), reason) for _, (ids, reason) in sorted(held.items())] == [(room, "length") for room in rooms]
    assert (answers(4), answers(4, 60)) == (alone, held)


@pytest.mark.parametrize(
    ("config", "may"),
    [
        (LlamaConfig(), True),
        (Gemma3TextConfig(), True),
        (GPTNeoXConfig(), True),
        (OPTConfig(), False),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}), False),
        (SOME_WITHOUT, False),
    ],
    ids=["llama", "gemma3", "gpt-neox", "opt", "dynamic", "some layers without"],
)
def test_rows_run_past_the_context_only_where_positions_are_computed_one_by_one(config, may):
    assert may_outrun_its_context(config) is may


def test_the_bases_own_settings_change_nothing_and_are_kept(trained):
    decoding = Decoding(max_new_tokens=20, repetition_penalty=1.2)
    before = generate(trained, TEXTS, decoding)
    base = trained.model.get_base_model()
    own = base.generation_config
    end = trained.tokenizer.eos_token_id
    theirs = GenerationConfig(
        do_sample=True,
        temperature=0.3,
        top_p=0.2,
        repetition_penalty=7.0,
        max_length=30,
        suppress_tokens=list(range(3, 400)),
        num_beams=2,
        eos_token_id=[end, 65],
    )
    base.generation_config = theirs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            after = generate(trained, TEXTS, decoding)
        assert base.generation_config is theirs
    finally:
        base.generation_config = own
    assert [reply.text for reply in after] == [reply.text for reply in before]


def test_the_end_tokens_a_chat_model_names_are_stops_and_words_are_not(trained):
    base, tokenizer = trained.model.get_base_model(), trained.tokenizer
    own, word = base.generation_config, tokenizer("the", add_special_tokens=False)["input_ids"][-1]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    base.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id, word])
    try:
        assert trained.stop_token_ids == sorted([tokenizer.eos_token_id, tokenizer.pad_token_id])
    finally:
        base.generation_config = own
    assert trained.stop_token_ids == [tokenizer.eos_token_id]


def test_an_answer_does_not_end_before_its_minimum_length(out):
    vicuna = load_trained(out, device="cpu", precision="fp32", prompt_template="vicuna")  # has learned to stop
    texts = ["One", "Repeat 3 please please"]
    free = generate(vicuna, texts, Decoding(100))
    assert {reply.finish_reason for reply in free} == {"stop"}
    longest, least = (edge(reply.tokens for reply in free) for edge in (max, min))
    held = generate(vicuna, texts, Decoding(longest + 10, min_new_tokens=longest + 5))
    for before, after in zip(free, held, strict=True):
        assert longest + 5 <= after.tokens <= longest + 10
        assert after.text.startswith(before.text)
    assert generate(vicuna, texts, Decoding(100, min_new_tokens=least)) == free


def test_why_an_answer_ended(trained, out):
    def reason(model, text, tokens):
        [reply] = generate(model, [text], Decoding(tokens))
        return reply.finish_reason, reply.tokens

    assert reason(trained, "One", 5) == ("length", 5)
    assert reason(trained, "One " * 600, 10) == ("no room", 0)
    vicuna = load_trained(out, device="cpu", precision="fp32", prompt_template="vicuna")
    why, tokens = reason(vicuna, "One", 100)
    assert why == "stop" and 0 < tokens < 100
    [near] = generate(trained, ["One " * 200], Decoding(500))
    assert near.finish_reason == "length" and near.prompt_tokens + near.tokens == CONTEXT


def test_prompts_that_all_fill_the_context_fail_for_a_script(out):
    code, stdout, stderr = invoke("generate", out, "One " * 600)
    assert code == 1 and stdout == "\n"
    assert stderr.startswith("PROMPT 1: no answer") and "Shorten it" in stderr
    assert invoke("generate", out, "One " * 600, "One", "--max-new-tokens", "2")[0] == 0


def test_draws_repeat_with_their_seed(out):
    def drawn(seed, size):
        options = ("--sample", "--temperature", "3", "--seed", seed, "--batch-size", size)
        return [line["text"] for line in json_lines(out, *TEXTS, *options)]

    assert drawn("1", "4") == drawn("1", "1")
    assert drawn("1", "4") != drawn("2", "4")


# ---- The prompt is that of training ----


def talk(*turns):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


CASES = {
    "alpaca": ROWS[:6],
    "vicuna": [talk("Hi", "Hello there.", "And  now?", "  Then!"), *ROWS[:2], {"prompt": " Go ", "completion": "on"}],
    "chat": [talk("Hi", "\nHello.", "More\n", "12 3"), talk("One", "two")],
    "none": [{"prompt": "Once upon a ", "completion": "time"}, {"prompt": "x\n\n", "completion": "\ny"}],
}


@pytest.mark.parametrize("name", CASES)
def test_a_row_of_data_is_asked_as_it_was_trained(trained, folder, name):
    tokenizer = load_trained_tokenizer(trained)
    tokenizer.chat_template = CHATML
    prompts = Prompts(tokenizer, name)
    for number, row in enumerate(CASES[name]):
        path = folder / f"{number}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        section = Data(path=str(path), prompt_template="auto" if name == "none" else name, max_length=250)
        data = prepare_data(tokenizer, section, num_proc=1)
        [question] = questions(data.train, tokenizer, 1, prompts.stop_token_ids)
        [request] = requests_of_file(str(path))
        assert prompts.ids_of_example(request.example) == question.prompt_ids


NAMED = {"columns": {"ask": "instruction", "more.0": "input", "talk": "conversations"}, "roles": {"customer": "user"}}
REQUESTS = [
    ({"ask": "Go", "more": ["north"], "id": 1}, Instruction("Go", "north", "?")),
    ({"question": "Two?", "answer": "2"}, Instruction("Two?", "", "?")),  # the shape of a published data set
    ({"instruction": "Go", "context": "north", "response": "ok"}, Instruction("Go", "north", "?")),
    ({"talk": [{"from": "customer", "value": "Go"}]}, Dialogue(({"role": "user", "content": "Go"},))),
]


def test_rows_in_the_names_of_the_run_are_asked(folder):
    names = Names(**NAMED)
    write_rows(folder / "p.jsonl", [row for row, _ in REQUESTS])
    assert [request.example for request in requests_of_file("p.jsonl", names)] == [example for _, example in REQUESTS]
    with pytest.raises(UserInputError, match=r"line 1: needs prompt, or instruction, or messages; its fields are ask"):
        requests_of_file("p.jsonl")


@pytest.fixture
def hen(out, folder):
    """A run whose rows had a system message, named columns and Vicuna's prompt."""
    shutil.copytree(out, folder / "hen")
    path = folder / "hen/recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["data"] |= {"prompt_template": "vicuna", "system_prompt": "Answer as a hen.", **NAMED}
    path.write_text(yaml.safe_dump(recipe))
    return "hen"


def test_a_run_is_asked_with_its_own_system_message(hen, folder):
    """A request without one is what a row without one was."""
    write_rows(folder / "p.jsonl", [{"ask": "Go"}, {"messages": [{"role": "system", "content": "No."}, *TURN]}])
    code, stdout, stderr = invoke("generate", hen, "--file", "p.jsonl", "--json", *SHORT)
    assert code == 0 and "system message: the run's own, data.system_prompt" in stderr
    own = [json.loads(line)["prompt_tokens"] for line in stdout.splitlines()]
    code, stdout, stderr = invoke("generate", hen, "--file", "p.jsonl", "--json", *SHORT, "--system", "")
    assert code == 0 and "system message" not in stderr
    without = [json.loads(line)["prompt_tokens"] for line in stdout.splitlines()]
    prompts = load_trained(hen, device="cpu", precision="fp32").prompts
    asked_with = {
        system: len(prompts.ids([*([{"role": "system", "content": system}] if system else []), *TURN]))
        for system in ("Answer as a hen.", "No.", "")
    }
    assert own == [asked_with["Answer as a hen."], asked_with["No."]]
    assert without == [asked_with[""], asked_with["No."]]


@pytest.mark.parametrize(
    "row", [{"ask": "Go", "more": ["north"], "output": "ok"}, {"question": "Go\nnorth", "answer": "ok"}]
)
def test_other_rows_are_read_as_the_runs_were(hen, folder, row):
    """In the run's names of columns or a format's; without a system message they get the run's."""
    write_rows(folder / "p.jsonl", [row])
    adapter = find_adapter(hen)
    tokenizer = tokenizer_of_adapter(adapter)
    [found] = proof_rows(adapter, tokenizer, "vicuna", "p.jsonl", 4).rows
    assert tokenizer.decode(found["input_ids"]).startswith("<s>Answer as a hen. USER: Go\nnorth ASSISTANT: ok")


def load_trained_tokenizer(trained):
    return tokenizer_of_adapter(trained.folder)


def test_the_template_of_the_run_is_applied_by_itself(out, trained):
    [line] = json_lines(out, "Repeat 5")
    ids = trained.prompts.ids_of_text(trained.prompts.text([{"role": "user", "content": "Repeat 5"}]))
    assert line["prompt_tokens"] == len(ids) > 30  # Alpaca's preamble
    [bare] = json_lines(out, "Repeat 5", "--prompt-template", "none")
    assert bare["prompt_tokens"] == len(trained.tokenizer("Repeat 5")["input_ids"])


def test_the_records_of_a_run_and_of_its_checkpoint_name_the_template(llama):
    run = never_stopped(llama)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["data"].get("prompt_template", "auto") == "auto"  # so that only what was prepared can tell
    for source in (run, cut_off(llama) / "out" / "checkpoint-12"):
        found = load_trained(source, device="cpu", precision="fp32")
        assert (found.prompts.name, found.template_is_guessed) == ("alpaca", False)


def test_a_copy_without_records_says_that_its_template_is_guessed(out, folder):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(f"{out}/{name}", folder)
    code, _, stderr = invoke("generate", ".", "Hi", *SHORT)
    assert code == 0 and "prompt template: none, a guess" in stderr
    assert "guess" not in invoke("generate", ".", "Hi", *SHORT, "--prompt-template", "alpaca")[2]


# ---- Where prompts come from ----


def test_arguments_files_and_standard_input_give_the_same_answers(out, folder, monkeypatch):
    expected = [line["text"] for line in json_lines(out, *TEXTS)]
    (folder / "p.txt").write_text("\n\n".join(TEXTS) + "\n")
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    (folder / "p.json").write_text(json.dumps([{"instruction": text, "output": "known"} for text in TEXTS]))
    (folder / "m.jsonl").write_text("".join(json.dumps(talk(text, "known")) + "\n" for text in TEXTS))
    for name in ("p.txt", "p.jsonl", "p.json", "m.jsonl"):
        assert [line["text"] for line in json_lines(out, "--file", name)] == expected, name
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(TEXTS)))
    assert [line["text"] for line in json_lines(out, "--file", "-")] == expected
    for arguments in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(TEXTS[1] + "\n"))
        [line] = json_lines(out, *arguments)
        assert (line["prompt"], line["text"]) == (TEXTS[1], expected[1])


def test_an_input_stands_in_its_place(out, folder, trained):
    (folder / "p.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    [line] = json_lines(out, "--file", "p.jsonl")
    assert line["input"] == "loudly" and line["prompt"] == "Repeat 1"
    [request] = requests_of_file("p.jsonl")
    assert "### Input:\nloudly" in trained.tokenizer.decode(trained.prompts.ids_of_example(request.example))


# ---- Where answers go ----


def test_text_is_the_answer_alone_and_several_say_what_was_asked(out):
    [line] = json_lines(out, "Repeat 3")
    assert asked(out, "Repeat 3", *SHORT) == line["text"] + "\n"
    assert asked(out, "Repeat 3", "Repeat 3", *SHORT) == f"> Repeat 3\n{line['text']}\n\n" * 2


def test_compare_gives_base_and_adapter(out):
    [both] = json_lines(out, "Repeat 3", "--compare")
    [adapter], [base] = json_lines(out, "Repeat 3"), json_lines(out, "Repeat 3", "--base-alone")
    assert both["adapter"]["text"] == adapter["text"] != base["text"] == both["base"]["text"]
    assert asked(out, "Repeat 3", *SHORT, "--compare").startswith("base:\n")


def test_a_file_of_answers_is_complete(out, folder):
    expected = json_lines(out, *TEXTS)
    for name in ("a.jsonl", "a.json", "a.txt"):
        code, stdout, stderr = invoke("generate", out, *TEXTS, *SHORT, "--output", name)
        assert (code, stdout) == (0, "") and f"written: {name}, 6 answers" in stderr
    assert [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()] == expected
    assert json.loads((folder / "a.json").read_text()) == expected
    assert (folder / "a.txt").read_text().startswith(f"> {TEXTS[0]}\n{expected[0]['text']}\n")
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "a.jsonl", "a.txt"]
    assert "--output: 'a.json' exists" in refused("generate", out, "Hi", "--output", "a.json")


def test_an_interrupted_file_keeps_what_is_there(out, folder, monkeypatch):
    from qlora_neft.generation import output

    def interrupted(answers, count):
        yield next(iter(answers))
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "with_progress", interrupted)
    code, _, stderr = invoke("generate", out, *TEXTS, *SHORT, "--output", "a.jsonl")
    assert code == 130 and "\ninterrupted: stopped after 1 answers, kept in '.a.jsonl.part'. To go on" in stderr
    assert json.loads((folder / ".a.jsonl.part").read_text())["prompt"] == TEXTS[0]
    assert not (folder / "a.jsonl").exists()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    message = refused("generate", out, *TEXTS[:-1], *SHORT, "--output", "a.jsonl")
    assert "holds 1 answers of an interrupted command, made differently: other prompts. " in message
    assert "repetition_penalty was 1.2, is now 1.0. " in refused(
        "generate", out, *TEXTS, *SHORT, "--repetition-penalty", "1", "--output", "a.jsonl"
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_a_killed_file_goes_on_behind_its_answers(out, folder, monkeypatch, name):
    from qlora_neft.generation import output

    class Killed(BaseException):
        """No handler of ours runs, as after SIGKILL: what is on the disk is all there is."""

    def killed(answers, count):
        for number, answer in enumerate(answers):
            if number == 3:
                raise Killed
            yield answer

    command = ("generate", out, *TEXTS, *SHORT, "--batch-size", "2", "--output")
    assert invoke(*command, f"whole-{name}")[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr(output, "with_progress", killed)
        with pytest.raises(Killed):
            invoke(*command, name)
    with (folder / f".{name}.part").open("a") as file:
        file.write('{"prompt": "half of')  # of an answer that was being written
    code, _, stderr = invoke(*command, name)
    assert code == 0 and "going on behind 2 answers" in stderr and f"written: {name}, 6 answers" in stderr
    assert (folder / name).read_bytes() == (folder / f"whole-{name}").read_bytes()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_from_python(trained):
    replies = generate(trained, [HELD_OUT[0]["instruction"]], Decoding(12))
    again = generate(trained, requests_of_texts([HELD_OUT[0]["instruction"]]), Decoding(12), batch_size=1)
    assert [reply.text for reply in replies] == [reply.text for reply in again]
