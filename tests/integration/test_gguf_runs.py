"""A real llama.cpp loads what is written, splits text as transformers does, and computes the same logits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import never_stopped
from test_gguf import SCALES, adapted
from tiny import save_tiny_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import qlora_neft
from qlora_neft.adapter.folder import find_adapter
from qlora_neft.adapter.load import base_of_adapter, load_trained, with_adapter
from qlora_neft.errors import UserInputError
from qlora_neft.export.gguf.lora import write_lora_gguf
from qlora_neft.export.gguf.model import write_model_gguf
from qlora_neft.export.gguf.vocabulary import LLAMA3_REGEX, QWEN2_REGEX
from qlora_neft.generation.decode import Decoding, generate_ids

llama_cpp = pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: pip install llama-cpp-python builds it"
)
DEMO = Path(qlora_neft.__file__).parent / "demo" / "base"
SHARED = Path(__file__).parents[3] / "shared" / "models"
ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}
F32_CACHE = {"type_k": 0, "type_v": 0, "flash_attn": False}  # llama.cpp's own default is a cache in f16
TEXTS = [
    "Below is an instruction.\n\n### Instruction:\nSay 'hello' to Clara's 12345 swans, don't!\n\n### Response:",
    "tabs\tand  two   three    spaces \n \n\n  ends with spaces   ",
    "it's I'M we'LL 1234567 3.14 x=10**3; foo_bar(baz)[0] # comment\r\nnext\r\n\r\n",
    "na\u00efve caf\u00e9 \u2014 \u4f60\u597d\uff0c\u4e16\u754c "
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 "
    "\U0001f984\U0001f468\u200d\U0001f469 \u00bd\u2460 e\u0301",
    " leading space",
    "\nleading line",
    "a",
    "",
    "</s> and <s> inside <|im_end|>text",
]


def loaded(path, **options):
    """A model in llama.cpp, computing in float32."""
    return llama_cpp.Llama(str(path), n_ctx=256, verbose=False, logits_all=True, **ONE_THREAD, **F32_CACHE, **options)


def logits(model, ids):
    """Logits of every position, (T, V)."""
    model.reset()
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


def ours(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]


IDS = [257, *b"Where does the horse live? In a stable, said the owl.", 3, 250, 17]


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
def test_a_model_computes_the_same(architecture_dir, tmp_path, architecture):
    base = architecture_dir(architecture)
    write_model_gguf(base, tmp_path / "m.gguf", "f32")
    expected = ours(AutoModelForCausalLM.from_pretrained(base).eval(), IDS)
    torch.testing.assert_close(logits(loaded(tmp_path / "m.gguf"), IDS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
        {"attention_bias": True, "rms_norm_eps": 0.1},
        {"num_attention_heads": 2, "head_dim": 64},
    ],
    ids=["linear", "llama3", "bias", "wide heads"],
)  # fmt: skip
def test_what_a_llama_may_vary_in_is_kept(tmp_path, change):
    base = save_tiny_model(tmp_path / "base", "llama", **change)
    if "attention_bias" in change:
        model = AutoModelForCausalLM.from_pretrained(base)
        for name, param in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(param, std=0.5)
        model.save_pretrained(base)
    write_model_gguf(base, tmp_path / "m.gguf", "f32")
    expected = ours(AutoModelForCausalLM.from_pretrained(base).eval(), IDS)
    plain = logits(loaded(tmp_path / "m.gguf"), IDS)
    torch.testing.assert_close(plain, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "scale"), [*(("llama", scale) for scale in SCALES), ("qwen3", "all")])
def test_base_and_adapter_compute_the_same(architecture_dir, tmp_path, architecture, scale):
    base = architecture_dir(architecture)
    model = adapted(base, tmp_path / "adapter", **SCALES[scale])
    write_model_gguf(base, tmp_path / "base.gguf", "f32")
    write_lora_gguf(find_adapter(tmp_path / "adapter"), tmp_path / "a.gguf")
    found = logits(loaded(tmp_path / "base.gguf", lora_path=str(tmp_path / "a.gguf")), IDS)
    expected = ours(model, IDS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():  # and the adapter matters
        assert (ours(model, IDS) - expected).abs().max() > 0.01


def test_the_model_that_was_trained_answers_the_same(llama, tmp_path):
    trained = load_trained(never_stopped(llama), device="cpu", precision="fp32")
    prompts = [trained.prompts.ids([{"role": "user", "content": f"Repeat {n}"}]) for n in range(4)]
    options = {"batch_size": 1, "stop_token_ids": trained.prompts.stop_token_ids}
    answers = dict(generate_ids(trained.model, trained.tokenizer, prompts, Decoding(24), **options))
    base = base_of_adapter(trained.folder, trained.policy).dequantize()
    with_adapter(base, trained.folder).merge_and_unload().save_pretrained(tmp_path / "merged")
    trained.tokenizer.save_pretrained(tmp_path / "merged")
    write_model_gguf(tmp_path / "merged", tmp_path / "m.gguf", "f32")
    model = loaded(tmp_path / "m.gguf")
    for n, prompt in enumerate(prompts):
        assert greedy(model, prompt, 24, trained.prompts.stop_token_ids) == answers[n]


def greedy(model, prompt, count, stops):
    """Greedy tokens, the stop token left away."""
    model.reset()
    found = []
    for token in model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        if token in stops or len(found) == count:
            break
        found.append(token)
    return found


# ---- The same tokens ----


def same_tokens(folder, gguf, texts=TEXTS):
    """llama.cpp's tokens of every text, against transformers'; special tokens in a text count as such in both."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False)
    for text in texts:
        found = model.tokenize(text.encode(), add_bos=True, special=True)
        assert found == tokenizer(text)["input_ids"], text
        bare = model.tokenize(text.encode(), add_bos=False, special=True)
        assert bare == tokenizer(text, add_special_tokens=False)["input_ids"], text


def byte_level(*steps, use_regex=False, normalizer=None, **model):
    """A byte-level BPE tokenizer trained on the texts, with the pre-tokenizer given."""
    tokenizer = Tokenizer(models.BPE(**model))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    special = ["<s>", "</s>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(TEXTS * 2, trainers.BpeTrainer(vocab_size=420, **options))
    return tokenizer


def isolated(regex):
    return pre_tokenizers.Split(Regex(regex), "isolated")


TOKENIZERS = {
    "gpt-2": lambda: byte_level(use_regex=True),
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "qwen2": lambda: byte_level(isolated(QWEN2_REGEX)),
    "llama-bpe": lambda: byte_level(isolated(LLAMA3_REGEX), ignore_merges=True),
    "dbrx": lambda: byte_level(isolated(LLAMA3_REGEX)),
}


def model_with(tokenizer, folder, **special):
    """A tiny Llama with that tokenizer; its vocabulary a few rows larger, as real ones are."""
    size = tokenizer.get_vocab_size() + 5
    save_tiny_model(folder, "llama", vocab_size=size, pad_token_id=0, bos_token_id=0, eos_token_id=1)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **special)
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", TOKENIZERS)
def test_byte_level_text_is_split_the_same(tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_tokens([AddedToken("foo_bar", normalized=False)])
    folder = model_with(tokenizer, tmp_path / "model")
    write_model_gguf(folder, tmp_path / "m.gguf")
    same_tokens(folder, tmp_path / "m.gguf")


def sentencepiece(prefix):
    """A tokenizer as SentencePiece's BPE becomes one: bytes as a last resort, all pairs of a token merged."""
    letters = sorted(set("".join(TEXTS[:3]).replace(" ", "\u2581")) | {"\u2581"})
    words = ["in", "\u2581in", "st", "ins", "inst", "\u2581inst", "ru", "ct", "ion", "io", "on", "\u2581\u2581",
             "\u2581\u2581\u2581\u2581", "12", "123"]  # fmt: skip
    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{n:02X}>" for n in range(256)), *letters, *words]
    vocab = {token: n for n, token in enumerate(tokens)}
    merges = [(w[:cut], w[cut:]) for w in words for cut in range(1, len(w)) if {w[:cut], w[cut:]} <= vocab.keys()]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581")] * prefix + [normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>", "<|im_end|>"])
    return tokenizer


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_text_is_split_the_same(tmp_path, prefix):
    folder = model_with(sentencepiece(prefix), tmp_path / "model", unk_token="<unk>")
    write_model_gguf(folder, tmp_path / "m.gguf")
    same_tokens(folder, tmp_path / "m.gguf")


def test_the_demos_text_is_split_the_same(tmp_path):
    write_model_gguf(DEMO, tmp_path / "m.gguf")
    same_tokens(DEMO, tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["stories260K", "babyllama361"])
def test_a_real_pretrained_model(tmp_path, name):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{name} lies beside the repository (../shared/models), and it is not there")
    [note] = write_model_gguf(folder, tmp_path / "m.gguf", "f32")
    assert "</s>" in note  # in these two it is no special token
    same_tokens(folder, tmp_path / "m.gguf", [text for text in TEXTS if "</s>" not in text])
    ids = AutoTokenizer.from_pretrained(folder)("Once upon a time, there was a little girl named Lily.")["input_ids"]
    expected = ours(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), ids)
    torch.testing.assert_close(logits(loaded(tmp_path / "m.gguf"), ids), expected, atol=1e-3, rtol=1e-4)


def other_regex():
    return byte_level(isolated(r"\p{L}+|\p{N}{1,2}|[^\p{L}\p{N}]+"))


def gaps():
    tokenizer = json.loads(sentencepiece(True).to_str())
    tokenizer["model"]["merges"].remove(["\u2581", "in"])
    return Tokenizer.from_str(json.dumps(tokenizer))


def unordered():
    tokenizer = json.loads(sentencepiece(True).to_str())
    merges = tokenizer["model"]["merges"]
    merges.append(merges.pop(merges.index(["in", "st"])))
    return Tokenizer.from_str(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (other_regex, "pre-tokenizer"),
        (lambda: byte_level(isolated(QWEN2_REGEX), ignore_merges=True), "pre-tokenizer"),
        (lambda: byte_level(use_regex=True, normalizer=normalizers.Lowercase()), "normalizer is Lowercase"),
        (gaps, "are not merged, though"),
        (unordered, "do not stand together"),
    ],
    ids=["other expression", "words taken whole", "lower case", "a merge left out", "merges out of order"],
)
def test_text_that_would_be_split_otherwise_is_refused(tmp_path, make, match):
    folder = model_with(make(), tmp_path / "model")
    with pytest.raises(UserInputError, match=f"cannot split text.*{match}"):
        write_model_gguf(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_wrong_name_would_be_noticed(tmp_path, monkeypatch):
    """The comparison of tokens can fail: Llama 3's digits under Qwen2's name."""
    folder = model_with(TOKENIZERS["dbrx"](), tmp_path / "model")
    monkeypatch.setattr("qlora_neft.export.gguf.vocabulary._byte_level_name", lambda *_: "qwen2")
    write_model_gguf(folder, tmp_path / "m.gguf")
    with pytest.raises(AssertionError):
        same_tokens(folder, tmp_path / "m.gguf")


def test_text_of_llama_cpp_is_that_of_transformers(tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    write_model_gguf(tmp_path / "model", tmp_path / "m.gguf")
    model = llama_cpp.Llama(str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    for text in TEXTS[:4]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.detokenize(ids).decode() == tokenizer.decode(ids)
