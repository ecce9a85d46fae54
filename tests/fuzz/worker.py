"""The process of one target: ``python -m tests.fuzz.worker TARGET [options of libFuzzer, files]``.

The fuzzer takes the process over and ends it: 0 when nothing was found. With files instead of
folders it runs the target on each of them once, which is how a finding is looked at again.
"""

from __future__ import annotations

import json.decoder
import json.scanner
import sys

import atheris

with atheris.instrument_imports(include=["sidecar.protocol", "sidecar.policy.document"]):
    from tests.fuzz import targets

SECOND_READING = (
    (json.decoder, "JSONArray"),
    (json.decoder, "JSONObject"),
    (json.decoder, "py_scanstring"),
    (json.scanner, "py_make_scanner"),
)
"""JSON as Python reads it without C: what is new to it is worth keeping too."""


def main() -> None:
    """Search until libFuzzer's limits, or the first finding."""
    _, target, *options = sys.argv
    for module, name in SECOND_READING:
        atheris.instrument_func(getattr(module, name))
    atheris.Setup([target, *options], getattr(targets, target))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
