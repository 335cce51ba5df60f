"""The fields of summary.json that scripts rely on, with their types."""

NUMBER, INTEGER, TEXT, BOOLEAN = float, int, str, bool
EVALUATION = {
    "accuracy": NUMBER,
    "accuracy_ci95": list,
    "loss": NUMBER,
    "loss_ci95": list,
    "examples": INTEGER,
}
# Every field of summary.json that the contract names.
SUMMARY = {
    "model": {
        "source": TEXT,
        "revision": (str, type(None)),
        "family": TEXT,
        "parameters": {"total": INTEGER, "trainable": INTEGER, "frozen": INTEGER},
    },
    "freeze": {
        "strategy": TEXT,
        "boundary": INTEGER,
        "certificate": {
            "ok": BOOLEAN,
            "leaves": INTEGER,
            "sha256_before": TEXT,
            "sha256_after": TEXT,
        },
    },
    "optimizer_state_bytes": INTEGER,
    "metrics": {"test": EVALUATION, "validation": EVALUATION},
    "cost": dict.fromkeys(
        (
            "flops_per_step",
            "flops_minimum",
            "compile_seconds",
            "cache_seconds",
            "train_seconds",
            "total_seconds",
            "examples_per_second",
            "input_wait_fraction",
        ),
        NUMBER,
    ),
    "environment": {"versions": dict, "devices": dict, "git": (dict, type(None))},
    "config_hash": TEXT,
}


def wrong_fields(content, schema, where="summary"):
    """Names of the fields that are missing or of another type."""
    wrong = []
    for name, kind in schema.items():
        here = f"{where}.{name}"
        if name not in content:
            wrong.append(f"{here} is missing")
        elif isinstance(kind, dict):
            wrong += wrong_fields(content[name], kind, here)
        elif not isinstance(content[name], kind) or (kind is int and content[name] is True):
            wrong.append(f"{here} is {content[name]!r}")
    return wrong
