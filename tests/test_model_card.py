"""The model card: front matter that the Hub parses, and facts a reader finds."""

import ast
import re

import pytest
from huggingface_hub import ModelCard

from tl_jax.model_card import model_card

COMMIT = "b4569560a39a0f1af58e3ddaf17facf20ab919b0"
BEFORE, AFTER = "ab" * 32, "cd" * 32


def facts(**changes):
    return {
        "source": "google/vit-base-patch16-224-in21k",
        "revision": COMMIT,
        "family": "vit",
        "data_source": "tfds:fashion_mnist:3.0.1",
        "splits": {"train": "train[:90%]", "validation": None, "test": "test"},
        "class_names": ("Trouser", "Bag", "Coat"),
        "strategy": "linear_probe",
        "trunk": "pretrained",
        "boundary_block": "head",
        "parameters": {"total": 1_000_000, "trainable": 2_500, "frozen": 997_500},
        "certificate": {
            "ok": True, "leaves": 198, "sha256_before": BEFORE, "sha256_after": BEFORE,
        },
        "test": {
            "accuracy": 0.8762, "accuracy_ci95": [0.8695, 0.8825], "loss": 0.3511,
            "examples": 10_000,
        },
        "validation": None,
        "image_size": (224, 224),
        "config_image_size": 224,
        "command": "python run.py --config configs/vit_fashion.py",
        "versions": {"jax": "0.10.2", "flax": "0.12.8"},
    } | changes  # fmt: skip


def front_matter(card: str) -> dict:
    return ModelCard(card, ignore_metadata_errors=False).data.to_dict()


def code_blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)\n```$", card, re.DOTALL | re.MULTILINE)


def test_front_matter_is_what_the_hub_reads():
    assert front_matter(model_card(facts())) == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["tl_jax", "transfer-learning"],
        "base_model": "google/vit-base-patch16-224-in21k",
        "datasets": ["fashion_mnist"],
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": "vit-base-patch16-224-in21k-fashion_mnist",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {
                            "type": "fashion_mnist",
                            "name": "fashion_mnist",
                            "split": "test",
                        },
                        "metrics": [{"type": "accuracy", "value": 0.8762}],
                    }
                ],
            }
        ],
    }


@pytest.mark.parametrize(
    ("source", "revision", "named"),
    [
        ("google/vit", COMMIT, True),
        ("gpt2", COMMIT, True),
        ("quickstart/weights", None, False),  # a relative folder
        ("/data/weights", None, False),
        ("../weights", None, False),
        ("~/weights", None, False),
        ("gs://bucket/weights", None, False),
        ("a/b/c", COMMIT, False),
        ("a/b: [c", COMMIT, False),
    ],
)
def test_base_model_is_a_hub_id_or_absent(source, revision, named):
    data = front_matter(model_card(facts(source=source, revision=revision)))
    assert data.get("base_model") == (source if named else None)


@pytest.mark.parametrize("strategy", ["random_trunk", "from_scratch"])
def test_a_random_trunk_has_no_base_model(strategy):
    card = model_card(facts(strategy=strategy, trunk="random"))
    assert "base_model" not in front_matter(card)
    assert "its trunk from random weights" in card and "pretrained network" not in card


@pytest.mark.parametrize(
    ("source", "datasets", "kind", "name"),
    [
        ("tfds:mnist_corrupted/spatter:1.0.0", ["mnist_corrupted"], "mnist_corrupted", None),
        ("hf:owner/name", ["owner/name"], "owner/name", None),
        ("hf:owner/name/config", ["owner/name"], "owner/name", None),
        ("folder:/home/somebody/my cats/", None, "imagefolder", "my cats"),
    ],
)
def test_data_set_in_the_front_matter(source, datasets, kind, name):
    data = front_matter(model_card(facts(data_source=source)))
    assert data.get("datasets") == datasets
    found = data["model-index"][0]["results"][0]["dataset"]
    assert (found["type"], found["name"]) == (kind, name or kind)


def test_without_a_test_there_is_no_model_index():
    card = model_card(facts(test=None))
    assert "model-index" not in front_matter(card) and "Not evaluated" in card


def test_facts_are_told():
    card = model_card(facts(validation=facts()["test"] | {"accuracy": 0.9, "examples": 6_000}))
    assert f"`google/vit-base-patch16-224-in21k` at revision `{COMMIT}` with a new head" in card
    assert "`tfds:fashion_mnist:3.0.1` (train `train[:90%]`, test `test`)" in card
    assert "3 classes" in card and "Classes: `Trouser`, `Bag`, `Coat`." in card
    assert "| test | 0.8762 | 0.8695 – 0.8825 | 0.3511 | 10,000 |" in card
    assert "| validation | 0.9000 | 0.8695 – 0.8825 | 0.3511 | 6,000 |" in card
    assert "Strategy `linear_probe`" in card and "is `head`." in card
    assert "| trainable | 2,500 | 0.25 % |\n| frozen | 997,500 | 99.75 % |" in card
    assert "Versions: flax 0.12.8, jax 0.10.2." in card
    assert code_blocks(card, "bash") == ["python run.py --config configs/vit_fashion.py"]


def test_a_folder_has_no_revision():
    assert "revision" not in model_card(facts(source="/data/weights", revision=None))


def certificate(**changes):
    return facts()["certificate"] | changes


def test_certificate():
    kept = model_card(facts())
    assert "198 frozen arrays" in kept and f"SHA-256 `{BEFORE}`" in kept
    broken = model_card(facts(certificate=certificate(ok=False, sha256_after=AFTER)))
    assert "Certificate broken" in broken and f"from `{BEFORE}` to `{AFTER}`" in broken
    assert "bit for bit" not in broken
    assert "nothing was frozen" in model_card(facts(certificate=certificate(leaves=0)))


@pytest.mark.parametrize(
    ("family", "image_size", "config_image_size", "needed"),
    [
        ("vit", (224, 224), 224, False),
        ("vit", (224, 224), [224, 224], False),
        ("vit", (64, 64), 224, True),
        ("vit", (224, 112), (112, 224), True),
        ("vit", (224, 112), (224, 112), False),
        ("resnet", (64, 64), None, False),
        ("resnet", (64, 64), 224, False),
    ],
)
def test_interpolation_is_asked_for_where_it_is_needed(
    family, image_size, config_image_size, needed
):
    card = model_card(
        facts(family=family, image_size=image_size, config_image_size=config_image_size)
    )
    assert f"{image_size[0]} × {image_size[1]} pixels" in card
    assert ("interpolate_pos_encoding=True" in code_blocks(card, "python")[0]) == needed
    assert ("needs `interpolate_pos_encoding=True`" in card) == needed


def test_code_is_python_and_opens_images_with_the_networks_channels():
    for channels, mode in ((3, "RGB"), (1, "L")):
        torch_code, jax_code = code_blocks(model_card(facts(channels=channels)), "python")
        for code in (torch_code, jax_code):
            ast.parse(code)
            assert f'.convert("{mode}")' in code
    assert '.convert("RGB")' in code_blocks(model_card(facts()), "python")[0]


def test_code_for_tl_jax_runs(tmp_path, monkeypatch, capsys):
    """The card's own lines against a classifier that takes what `load_pretrained` promises."""
    import numpy as np
    from PIL import Image

    import tl_jax

    class Classifier:
        class_names = ("Trouser", "Bag")

        def preprocess(self, images):
            assert images.dtype == np.uint8
            return images / 255

        def apply(self, images):
            assert images.shape == (1, 4, 6, channels)
            return np.array([[0.0, 1.0]])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tl_jax, "load_pretrained", lambda folder: Classifier())
    Image.new("RGB", (6, 4)).save("image.png")
    for channels in (1, 3):
        exec(code_blocks(model_card(facts(channels=channels)), "python")[1], {})
    assert capsys.readouterr().out.split() == ["Bag", "Bag"]


def test_many_classes_are_cut_short():
    card = model_card(facts(class_names=[f"class {i}" for i in range(1000)]))
    assert "1,000 classes" in card and "`class 99` and 900 more, see `config.json`." in card
    assert "class 100" not in card


def test_untrusted_text_stays_text():
    nasty = "a`b``c|d\n---\n# heading <script>\x00\u202e {{x}}"
    card = model_card(
        facts(
            class_names=[nasty, "`", ""],
            source=f"/data/{nasty}: x",
            revision=None,
            data_source=f"folder:/data/{nasty}: [y, 'z\"",
            command="python run.py\n```\n# not a heading",
        )
    )
    data = front_matter(card)
    plain = "a`b``c|d --- # heading <script> {{x}}"
    assert data["model-index"][0]["results"][0]["dataset"]["name"] == plain + ": [y, 'z\""
    _, _, body = card.split("---\n", 2)
    outside = re.sub(r"(?s)^(`{3,})\w*\n.*?^\1$", "", body, flags=re.MULTILINE)
    headings = [line for line in outside.splitlines() if line.startswith("#")]
    assert [h for h in headings[1:]] == [
        "## Result", "## What was trained", "## Use", "## Make it again",
    ]  # fmt: skip
    assert r"\<script\>" in headings[0] and "<script>" not in headings[0]
    assert f"``` {plain} ```" not in card and f"```{plain}```" in card
    assert "`` ` ``" in card
    assert "\x00" not in card and "\u202e" not in card
    assert "````bash\npython run.py\n```\n# not a heading\n````" in card


def test_numpy_values_are_accepted():
    import numpy as np

    test = facts()["test"] | {"accuracy": np.float32(0.5)}
    data = front_matter(model_card(facts(test=test)))
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5


def test_the_same_facts_give_the_same_card():
    assert model_card(facts()) == model_card(facts())
    assert model_card(facts()).endswith(".\n")
