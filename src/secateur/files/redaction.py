"""Credentials taken out of what is written down: records are published with the weights that they are about."""

import re
from typing import Any

HIDDEN = "***"

# An option or a parameter whose value is a credential. Those of tokenizers (bos_token, pad_token) are none.
_NAMES = r"(?:hf|hub|access|auth|api|bearer|refresh|secret)?[-_]?(?:token|api[-_]?key|password|passwd|secret)"
_OPTION = re.compile(rf"--?{_NAMES}", re.IGNORECASE)
_PATTERNS = (
    # Tokens of the hub, GitHub, GitLab, OpenAI and its kin, Slack and Amazon, and JSON web tokens.
    (re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abprs]-)[A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"\bAKIA[0-9A-Z]{16}\b"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]+"), HIDDEN),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
    # The part of an address before its host, and what signs one.
    (re.compile(r"(?<=://)[^/?#@\s]+@"), f"{HIDDEN}@"),
    (re.compile(rf"(?i)([?&](?:{_NAMES}|sig|signature|x-amz-[\w-]+|key)=)[^&#\s]+"), rf"\1{HIDDEN}"),
    (re.compile(rf"(?i)((?<!\S)--?{_NAMES}=)\S+"), rf"\1{HIDDEN}"),
    (
        re.compile(r"(?i)\b((?:HF|HUGGING_?FACE|OPENAI|GITHUB|AWS)_[A-Z_]*(?:TOKEN|KEY)=)\S+"),
        rf"\1{HIDDEN}",
    ),
)


def redacted(value: Any) -> Any:
    """The value with every credential in its texts hidden: texts, and lists and objects of them, at any depth.

    In a list, the text after an option such as --token is one, whatever it looks like.
    """
    if isinstance(value, str):
        for pattern, instead in _PATTERNS:
            value = pattern.sub(instead, value)
        return value
    if isinstance(value, dict):
        return {key: redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [redacted(item) for item in value]
        for number, option in enumerate(value[:-1]):
            if isinstance(option, str) and _OPTION.fullmatch(option) and isinstance(value[number + 1], str):
                items[number + 1] = HIDDEN
        return type(value)(items) if type(value) in (list, tuple) else items
    return value
