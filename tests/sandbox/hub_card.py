"""What the Hub checks in the metadata of a card (README.md), as far as it concerns models and datasets like ours.

A card that breaks a rule is refused, by `POST /api/validate-yaml` and again by the commit that carries it, so a mistake
shows here and not at the end of a user's week of work. Warnings do not stop anything.
https://github.com/huggingface/hub-docs has the fields (modelcard.md, datasetcard.md).
"""

import re

import yaml

METADATA = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---([\r\n]|$)", re.DOTALL)  # huggingface_hub has the same
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
SPLIT = re.compile(r"\w+(\.\w+)*")
LICENSES = ("apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0", "other", "unknown")
# What a result of a model-index must have.
RESULT = ("task.type", "dataset.type", "dataset.name", "metrics")


def check_card(text: str, kind: str) -> tuple[list[str], list[str]]:
    """The errors and the warnings that the Hub has about the card of a "model" or a "dataset"."""
    match = METADATA.match(text)
    if not match:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        metadata = yaml.safe_load(match[1]) or {}
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if not isinstance(metadata, dict):
        return ["the metadata must be a mapping"], []
    errors = [*check_language(metadata), *check_license(metadata)]
    warnings = []
    if not isinstance(metadata.get("tags", []), list):
        errors.append('"tags" must be an array')
    if kind == "model":
        errors += check_ids(metadata, "base_model", "Use a model id from https://hf.co/models.")
        warnings += check_ids(metadata, "datasets", "If possible, use a dataset id from https://hf.co/datasets.")
        errors += check_model_index(metadata.get("model-index", []))
    if kind == "dataset":
        errors += check_configs(metadata.get("configs", []))
    return errors, warnings


def as_list(value) -> list:
    return value if isinstance(value, list) else [value]


def check_language(metadata: dict) -> list[str]:
    languages = as_list(metadata.get("language", []))
    wrong = [language for language in languages if not LANGUAGE.fullmatch(str(language))]
    return [f'"language" with value "{language}" is not valid. It must be an ISO 639 code' for language in wrong]


def check_license(metadata: dict) -> list[str]:
    wrong = [name for name in as_list(metadata.get("license", [])) if name not in LICENSES]
    return [f'"license" must be one of [{", ".join(LICENSES)}, …], not "{name}"' for name in wrong]


def check_ids(metadata: dict, key: str, hint: str) -> list[str]:
    """Complain of what is no repository id, above all of paths of the machine that the model was made on."""
    wrong = [value for value in as_list(metadata.get(key, [])) if not HUB_ID.fullmatch(str(value))]
    return [f'"{key}" with value "{value}" is not valid. {hint}' for value in wrong]


def check_model_index(models) -> list[str]:
    """Complain of results without a task, a dataset, or a metric with type and value."""
    if not isinstance(models, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(models):
        if not model.get("name"):
            errors.append(f'"model-index[{i}].name" is required')
        for j, result in enumerate(model.get("results", [])):
            where = f"model-index[{i}].results[{j}]"
            errors += [f'"{where}.{path}" is required' for path in RESULT if look_up(result, path) in (None, "", [])]
            for k, metric in enumerate(result.get("metrics") or []):
                missing = [key for key in ("type", "value") if metric.get(key) is None]
                errors += [f'"{where}.metrics[{k}].{key}" is required' for key in missing]
    return errors


def look_up(mapping: dict, path: str):
    """The value at a dotted path, or None."""
    for key in path.split("."):
        mapping = mapping.get(key) if isinstance(mapping, dict) else None
    return mapping


def check_configs(configs) -> list[str]:
    """Complain of configurations without a name, and of data files without a path or with an impossible split."""
    if not isinstance(configs, list):
        return ['"configs" must be an array']
    errors = []
    for i, config in enumerate(configs):
        if not isinstance(config.get("config_name"), str):
            errors.append(f'"configs[{i}].config_name" must be a string')
        files = config.get("data_files", [])
        for j, file in enumerate(files if isinstance(files, list) else []):
            if not isinstance(file, dict):
                continue  # a path alone
            if "path" not in file:
                errors.append(f'"configs[{i}].data_files[{j}].path" is required')
            if not SPLIT.fullmatch(str(file.get("split", ""))):
                errors.append(f'"configs[{i}].data_files[{j}].split" must match /^{SPLIT.pattern}$/')
    return errors
