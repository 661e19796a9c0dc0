"""Train the small classifier whose features score sampled digits; writes it as a frozen graph.

    python quickstart/digit_classifier.py

Writes digit_classifier.pb beside this script, with the tensor names of the Inception graph (see
support/scores/graph.py). Trained on the 1,197 training digits only; prints its accuracy on both
halves. The graph is kept in the repository: scores are comparable only by the same one.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.data.datasets import digits_split
from support.scores.tensorflow_start import import_tensorflow
from support.system.files import atomic_write

tf = import_tensorflow()

GRAPH = Path(__file__).with_suffix(".pb")
CHANNELS = (16, 24, 48)  # after each convolution; the last is the number of features
CLASSES = 10
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, SEED = 100, 64, 2e-3, 1e-4, 0

# B images, C channels.


def initial_weights() -> list[np.ndarray]:
    """Filter and bias of three convolutions, then class weights: He's initialisation."""
    random_state = np.random.RandomState(SEED)
    weights = []
    for fan_in, channels in zip((1, *CHANNELS), CHANNELS, strict=False):
        weights.append(random_state.normal(size=(3, 3, fan_in, channels)) * (2 / 9 / fan_in) ** 0.5)
        weights.append(np.zeros(channels))
    weights.append(random_state.normal(size=(CHANNELS[-1], CLASSES)) * CHANNELS[-1] ** -0.5)
    return [array.astype(np.float32) for array in weights]


def classify(pixels: tf.Tensor, weights: list) -> tf.Tensor:
    """Logits [B, 10] of RGB pixels [B, 8, 8, 3], float 0..255; tensors named as Inception's."""
    filters_1, bias_1, filters_2, bias_2, filters_3, bias_3, class_weights = weights
    grey = tf.reduce_mean(pixels, axis=3, keepdims=True) / 127.5 - 1
    hidden = tf.nn.relu(tf.nn.conv2d(grey, filters_1, 1, "SAME") + bias_1)
    hidden = tf.nn.conv2d(hidden, filters_2, 2, "SAME", name="mixed_6/conv")
    hidden = tf.nn.relu(hidden + bias_2)
    hidden = tf.nn.relu(tf.nn.conv2d(hidden, filters_3, 1, "SAME") + bias_3)
    features = tf.reduce_mean(hidden, axis=[1, 2], keepdims=True, name="pool_3")
    flat = tf.reshape(features, [-1, CHANNELS[-1]])
    return tf.matmul(flat, class_weights, name="softmax/logits/MatMul")


def as_rgb(pixels: np.ndarray) -> tf.Tensor:
    """Float [B, 8, 8, 3] of grey uint8 [B, 8, 8, 1]."""
    return tf.constant(pixels.repeat(3, axis=3), tf.float32)


def train(pixels: tf.Tensor, labels: np.ndarray) -> list[tf.Variable]:
    """Weights after EPOCHS of Adam with a cosine learning rate; the same for the same machine."""
    weights = [tf.Variable(array) for array in initial_weights()]
    steps = EPOCHS * (len(labels) // BATCH)
    schedule = tf.keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    optimizer = tf.keras.optimizers.AdamW(schedule, weight_decay=WEIGHT_DECAY)
    optimizer.build(weights)

    @tf.function
    def step(chosen: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            logits = classify(tf.gather(pixels, chosen), weights)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.gather(labels, chosen), logits)
            mean_loss = tf.reduce_mean(loss)
        optimizer.apply_gradients(zip(tape.gradient(mean_loss, weights), weights, strict=True))

    random_state = np.random.RandomState(SEED)
    for _ in range(EPOCHS):
        order = random_state.permutation(len(labels))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            step(tf.constant(order[start : start + BATCH]))
    return weights


def accuracy(pixels: np.ndarray, labels: np.ndarray, weights: list) -> float:
    """The share of digits recognised."""
    found = classify(as_rgb(pixels), weights).numpy().argmax(axis=1)
    return float((found == labels).mean())


def freeze(weights: list[np.ndarray], path: Path) -> None:
    """Write the graph with its weights as constants."""
    graph = tf.Graph()
    with graph.as_default():
        image = tf.compat.v1.placeholder(tf.float32, [8, 8, 3], name="image")
        logits = classify(
            tf.expand_dims(image, 0, name="ExpandDims"), list(map(tf.constant, weights))
        )
        tf.nn.softmax(logits, name="softmax")
    with atomic_write(path) as file:
        file.write(graph.as_graph_def().SerializeToString(deterministic=True))


def main() -> None:
    """Train, judge, write."""
    tf.config.experimental.enable_op_determinism()
    tf.random.set_seed(SEED)
    split = digits_split()
    weights = train(as_rgb(split.training_pixels), split.training_labels)
    training = accuracy(split.training_pixels, split.training_labels, weights)
    held_out = accuracy(split.held_out_pixels, split.held_out_labels, weights)
    print(f"recognised: {training:.4f} of the training digits, {held_out:.4f} of the held-out ones")
    freeze([weight.numpy() for weight in weights], GRAPH)
    print(f"{GRAPH}: {GRAPH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
