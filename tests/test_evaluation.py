import jax.numpy as jnp
import numpy as np
import pytest

from tl_jax import evaluation, parallel


def first_pixels(variables, batch):
    """A network whose logits are the first pixels of the image."""
    return batch["image"][:, 0, :, 0] * variables["scale"]


def batches(count, size, classes=3):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(count, classes)).astype(np.float32)
    labels = rng.integers(0, classes, count).astype(np.int32)
    out = []
    for start in range(0, count, size):
        real = min(size, count - start)
        batch = {
            # padding that would count if it were not masked: never a number, of class 0
            "image": np.full((size, 1, classes, 1), np.nan, np.float32),
            "label": np.zeros(size, np.int32),
            "index": np.full(size, -1, np.int32),
            "mask": (np.arange(size) < real).astype(np.float32),
        }
        batch["image"][:real, 0, :, 0] = logits[start : start + real]
        batch["label"][:real] = labels[start : start + real]
        batch["index"][:real] = np.arange(start, start + real)
        out.append(batch)
    return logits, labels, out


@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
def test_exact_over_a_padded_split(kind):
    logits, labels, padded = batches(41, 16)
    devices = parallel.DataParallel(kind)
    step = evaluation.make_eval_step(first_pixels, 3, parallel.AXIS)
    step = devices.compile(step, arguments=1, donate=False)
    variables = devices.replicate({"scale": jnp.float32(2.0)})
    found = evaluation.evaluate(step, variables, map(devices.shard, padded), mistakes=5)

    scaled = 2.0 * logits.astype(np.float64)
    log_probability = scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
    guess = scaled.argmax(1)
    assert found.examples == 41
    assert found.accuracy == (guess == labels).mean()
    assert found.loss == pytest.approx(-log_probability[np.arange(41), labels].mean(), rel=1e-6)
    expected = np.zeros((3, 3), int)
    np.add.at(expected, (labels, guess), 1)
    np.testing.assert_array_equal(found.confusion, expected)
    assert found.per_class_accuracy == pytest.approx(np.diag(expected) / expected.sum(1))
    wrong = np.flatnonzero(guess != labels)
    sure = np.exp(log_probability.max(1))
    order = wrong[np.argsort(-sure[wrong])][:5]
    assert [index for _, index, _, _ in found.mistakes] == order.tolist()
    assert [(a, b) for _, _, a, b in found.mistakes] == [(labels[i], guess[i]) for i in order]
    np.testing.assert_array_equal(found.answers["label"], labels)
    np.testing.assert_array_equal(found.answers["prediction"], guess)
    np.testing.assert_allclose(found.answers["probability"], sure, rtol=1e-5)
    summary = found.summary()
    assert summary["examples"] == 41
    low, high = summary["accuracy_ci95"]
    assert low < found.accuracy < high
    own = -log_probability[np.arange(41), labels]
    wide = 1.959964 * own.std(ddof=1) / np.sqrt(41)
    assert summary["loss_ci95"] == pytest.approx([own.mean() - wide, own.mean() + wide], rel=1e-5)


def test_wilson_interval():
    # R: prop.test(81, 263, correct = FALSE)
    assert evaluation.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    low, high = evaluation.wilson_interval(20, 20)
    assert high == 1.0 and low == pytest.approx(0.8389, abs=5e-5)
    low, high = evaluation.wilson_interval(0, 20)
    assert low == 0.0 and high == pytest.approx(0.1611, abs=5e-5)


def test_a_class_without_examples_has_no_accuracy():
    found = evaluation.Evaluation(0.0, np.array([[2, 0], [0, 0]]), [], {})
    assert found.per_class_accuracy == [1.0, None]


def test_no_example_is_an_error():
    with pytest.raises(ValueError, match="no example"):
        evaluation.evaluate(lambda variables, batch: {}, {}, [])
