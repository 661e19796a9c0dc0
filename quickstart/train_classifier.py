"""Train the small classifier whose features score samples of a data set, and freeze its graph.

    python quickstart/train_classifier.py Digits
    python quickstart/train_classifier.py FashionMNIST --data data/fashion

Writes digit_classifier.pb or fashion_classifier.pb beside this script, with the tensor names of the
Inception graph (see support/scores/graph.py), and prints its accuracy. It is trained on the 1,197
training digits, or on the 10,000 clothes that no run trains on and none is scored against. The
graphs are kept in the repository, because scores are comparable only with the same graph.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from quickstart.score import right_class
from quickstart.small_sets import DEFAULT_FOLDER, SMALL_SETS
from support.data.images import LabelledImages
from support.scores.graph import FeatureGraph
from support.scores.tensorflow_start import import_tensorflow
from support.system.command import command_parser, run_command
from support.system.files import atomic_write

tf = import_tensorflow()

CLASSES = 10
BATCH, LEARNING_RATE, WEIGHT_DECAY, SEED = 64, 2e-3, 1e-4, 0


class Layer(NamedTuple):
    """A 3 x 3 convolution, with the name of its result in the graph."""

    channels: int
    stride: int
    name: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A classifier, and how it is trained."""

    layers: tuple[Layer, ...]  # the channels of the last one are the features
    epochs: int
    largest_shift: int = 0  # in pixels, drawn for each batch


SPATIAL = "mixed_6/conv"
RECIPES = {
    "Digits": Recipe((Layer(16, 1), Layer(24, 2, SPATIAL), Layer(48, 1)), epochs=100),
    "FashionMNIST": Recipe(
        (Layer(32, 1), Layer(32, 2), Layer(64, 1), Layer(64, 2, SPATIAL), Layer(64, 1)),
        epochs=40,
        largest_shift=2,  # the padding on each side, so that nothing is lost
    ),
}

# B images, H = W side, C channels.


def initial_weights(layers: Sequence[Layer]) -> list[np.ndarray]:
    """Filter and bias of each convolution, then class weights, by He's initialisation."""
    random_state = np.random.RandomState(SEED)
    weights, fan_in = [], 1
    for layer in layers:
        filters = random_state.normal(size=(3, 3, fan_in, layer.channels))
        weights += [filters * (2 / 9 / fan_in) ** 0.5, np.zeros(layer.channels)]
        fan_in = layer.channels
    weights.append(random_state.normal(size=(fan_in, CLASSES)) * fan_in**-0.5)
    return [array.astype(np.float32) for array in weights]


def classify(pixels: tf.Tensor, layers: Sequence[Layer], weights: list) -> tf.Tensor:
    """Logits [B, 10] of RGB pixels [B, H, W, 3], float 0..255; tensors named as Inception's."""
    *convolutions, class_weights = weights
    hidden = tf.reduce_mean(pixels, axis=3, keepdims=True) / 127.5 - 1
    for layer, filters, bias in zip(layers, convolutions[::2], convolutions[1::2], strict=True):
        hidden = tf.nn.conv2d(hidden, filters, layer.stride, "SAME", name=layer.name)
        hidden = tf.nn.relu(hidden + bias)
    features = tf.reduce_mean(hidden, axis=[1, 2], keepdims=True, name="pool_3")
    flat = tf.reshape(features, [-1, layers[-1].channels])
    return tf.matmul(flat, class_weights, name="softmax/logits/MatMul")


def as_rgb(pixels: np.ndarray) -> tf.Tensor:
    """Float [B, H, W, 3] of grey uint8 [B, H, W, 1]."""
    return tf.constant(pixels.repeat(3, axis=3), tf.float32)


def train(images: LabelledImages, recipe: Recipe) -> list[tf.Variable]:
    """Weights after all epochs of AdamW with a cosine learning rate; the same on one machine."""
    weights = [tf.Variable(array) for array in initial_weights(recipe.layers)]
    epoch_steps = len(images.labels) // BATCH
    steps = recipe.epochs * epoch_steps
    schedule = tf.keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    optimizer = tf.keras.optimizers.AdamW(schedule, weight_decay=WEIGHT_DECAY)
    optimizer.build(weights)

    @tf.function
    def step(pixels: tf.Tensor, labels: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            logits = classify(pixels, recipe.layers, weights)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            mean_loss = tf.reduce_mean(loss)
        optimizer.apply_gradients(zip(tape.gradient(mean_loss, weights), weights, strict=True))

    random_state = np.random.RandomState(SEED)
    most = recipe.largest_shift
    for _ in range(recipe.epochs):
        order = random_state.permutation(len(images.labels))
        for chosen in order[: epoch_steps * BATCH].reshape(epoch_steps, BATCH):
            pixels = images.pixels[chosen]
            if most:
                pixels = np.roll(pixels, random_state.randint(-most, most + 1, 2), axis=(1, 2))
            step(as_rgb(pixels), tf.constant(images.labels[chosen]))
    return weights


def freeze(
    weights: list[np.ndarray], layers: Sequence[Layer], shape: tuple[int, int, int], path: Path
) -> None:
    """Write the graph for images of `shape` with its weights as constants."""
    graph = tf.Graph()
    with graph.as_default():
        image = tf.compat.v1.placeholder(tf.float32, [*shape[:2], 3], name="image")
        one_image = tf.expand_dims(image, 0, name="ExpandDims")
        logits = classify(one_image, layers, list(map(tf.constant, weights)))
        tf.nn.softmax(logits, name="softmax")
    with atomic_write(path) as file:
        file.write(graph.as_graph_def().SerializeToString(deterministic=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = command_parser(__doc__)
    parser.add_argument("set", choices=SMALL_SETS)
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder of the clothes")
    arguments = parser.parse_args(argv)
    small, recipe = SMALL_SETS[arguments.set], RECIPES[arguments.set]
    tf.config.experimental.enable_op_determinism()
    tf.random.set_seed(SEED)
    split = small.load(arguments.data)
    weights = train(split.classifier, recipe)
    freeze([weight.numpy() for weight in weights], recipe.layers, small.shape, small.graph)
    graph = FeatureGraph(small.graph, small.shape)
    own, held_out = (right_class(images, graph) for images in (split.classifier, split.held_out))
    print(f"accuracy: {own:.4f} on its training {small.noun}, {held_out:.4f} on held-out ones")
    print(f"{small.graph}: {small.graph.stat().st_size} bytes")


if __name__ == "__main__":
    run_command(main)
