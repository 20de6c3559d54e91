"""Model cards, checked as strictly as the Hub does: what it says of local paths, licences, lists and results."""

from __future__ import annotations

import re
from typing import Any

import yaml

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
# https://huggingface.co/docs/hub/repositories-licenses, the ones a base model is likely to have.
LICENSES = set(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr
    mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma
    unknown other""".split()
)
RELATIONS = ("adapter", "merge", "quantized", "finetune")


def problems_of(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a card's front matter."""
    front = re.match(r"\A(?:\ufeff)?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", content, re.DOTALL)
    if front is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        card = yaml.safe_load(front[1])
    except yaml.YAMLError as error:
        return [f"Invalid YAML in README.md: {str(error).splitlines()[0]}"], []
    if not isinstance(card, dict):
        return ["the metadata must be a mapping"], []
    return [*_ids(card), *_license(card), *_words(card), *_results(card.get("model-index"))], []


def _ids(card: dict[str, Any]) -> list[str]:
    problems = []
    for key in ("base_model", "datasets"):
        values = card.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not REPO_ID.fullmatch(value):
                problems.append(f'"{key}" with value {value!r} is not valid. Use a model id from https://hf.co/models.')
    if card.get("base_model_relation", "adapter") not in RELATIONS:
        problems.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
    return problems


def _license(card: dict[str, Any]) -> list[str]:
    stated = card.get("license", [])
    wrong = [value for value in (stated if isinstance(stated, list) else [stated]) if value not in LICENSES]
    problems = [f'"license" must be one of the known ones, got {value!r}' for value in wrong]
    if stated == "other" and not isinstance(card.get("license_name", ""), str):
        problems.append('"license_name" must be a string')
    if "license_link" in card and not re.fullmatch(r"LICENSE(\.\w+)?|https?://\S+", str(card["license_link"])):
        problems.append('"license_link" must be LICENSE, LICENSE.md or a URL')
    return problems


def _words(card: dict[str, Any]) -> list[str]:
    problems = [
        f'"{key}" must be a string, got {card[key]!r}'
        for key in ("library_name", "pipeline_tag", "license_name")
        if key in card and not isinstance(card[key], str)
    ]
    tags = card.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        problems.append('"tags" must be a list of strings')
    languages = card.get("language", [])
    for value in languages if isinstance(languages, list) else [languages]:
        if not isinstance(value, str) or not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual", value):
            problems.append(f'"language" must hold ISO 639 codes, got {value!r}')
    return problems


def _results(index: Any) -> list[str]:
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    problems = []
    for number, model in enumerate(index):
        place = f"model-index[{number}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not model["name"]:
            problems.append(f'"{place}.name" is required')
            continue
        results = model.get("results")
        if not isinstance(results, list):
            problems.append(f'"{place}.results" must be an array')
            continue
        for place_of, result in ((f"{place}.results[{at}]", result) for at, result in enumerate(results)):
            problems += _result(place_of, result)
    return problems


def _result(place: str, result: Any) -> list[str]:
    if not isinstance(result, dict):
        return [f'"{place}" must be an object']
    problems = []
    for key, wanted in (("task", ("type",)), ("dataset", ("type", "name"))):
        part = result.get(key)
        missing = [name for name in wanted if not isinstance(part, dict) or not isinstance(part.get(name), str)]
        problems += [f'"{place}.{key}.{name}" is required' for name in missing]
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        return [*problems, f'"{place}.metrics" must be an array that is not empty']
    for number, metric in enumerate(metrics):
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str):
            problems.append(f'"{place}.metrics[{number}].type" is required')
        value = metric.get("value") if isinstance(metric, dict) else None
        if value is None or (isinstance(value, float) and value != value):
            problems.append(f'"{place}.metrics[{number}].value" is required')
    return problems
