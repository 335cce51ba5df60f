"""What a run exports is, for transformers with PyTorch, the classifier that the run evaluated."""

import dataclasses
import json

import numpy as np
import pytest
from golden import networks
from safetensors.numpy import load_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tl_jax import load_pretrained, trainer  # noqa: E402

RUNS = {
    "probe": ("resnet_bottleneck", "float32", {}),
    "moved_statistics": (
        "resnet_basic",
        "float32",
        {"freeze.strategy": "full", "freeze.batch_norm": "batch"},
    ),
    "vit": ("vit_plain", "float32", {"freeze.strategy": "top_k", "freeze.k": 1}),
    "half_precision_source": ("vit_plain", "float16", {}),
}


@pytest.fixture(params=RUNS)
def run(request, network, digits_config, tmp_path):
    """Source, export, summary and test examples of one short run."""
    name, dtype, fields = RUNS[request.param]
    source = network(name)
    if dtype != "float32":
        shapes = {
            key: value.shape for key, value in load_file(f"{source}/model.safetensors").items()
        }
        source = str(tmp_path / "source")
        networks.write_folder(tmp_path / "source", networks.CONFIGS[name], shapes, name, dtype)
    config = digits_config(name, **{"model.pretrained": source, "train.epochs": 1, **fields})
    summary = trainer.train(config, tmp_path / "run")
    splits = dataclasses.asdict(config.data.splits)
    examples = trainer.job_lib.open_examples(config, splits)["test"]
    return source, tmp_path / "run" / "export", summary, examples


def test_transformers_makes_of_it_what_the_run_evaluated(run):
    source, export, summary, examples = run
    model, info = transformers.AutoModelForImageClassification.from_pretrained(
        export, output_loading_info=True
    )
    assert not any(info.values()), info
    processor = transformers.AutoImageProcessor.from_pretrained(export, backend="pil")
    labels = np.array([example["label"] for example in examples])
    images = np.stack([np.repeat(example["image"], 3, axis=-1) for example in examples])
    with torch.no_grad():
        pixels = processor(list(images), return_tensors="pt")
        theirs = model.eval()(**pixels).logits.numpy()

    ours = load_pretrained(str(export))
    logits = np.asarray(ours.apply(ours.preprocess(images)))
    np.testing.assert_allclose(theirs, logits, rtol=0, atol=1e-4 * np.abs(logits).max())
    found = summary["metrics"]["test"]
    assert (theirs.argmax(-1) == labels).mean() == found["accuracy"]
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(theirs), torch.from_numpy(labels))
    assert float(loss) == pytest.approx(found["loss"], rel=1e-4)

    assert model.config.id2label == {i: str(i) for i in range(10)}
    written, read = (
        load_file(export / "model.safetensors"),
        load_file(f"{source}/model.safetensors"),
    )
    moved = {key for key in read if written[key].tobytes() != read[key].tobytes()}
    assert moved and all(written[key].dtype == np.float32 for key in moved)
    if summary["freeze"]["strategy"] == "linear_probe":
        assert all(key.startswith("classifier") for key in moved)
    if summary["freeze"]["batch_norm"] == "batch":
        assert any("running_var" in key for key in moved)
    assert json.loads((export / "config.json").read_text())["dtype"] == "float32"
