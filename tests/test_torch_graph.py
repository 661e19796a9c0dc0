"""A frozen graph gives in torch what it gives in TensorFlow: each operation, and all together."""

import numpy as np
import pytest
from inception_graph import write_inception_graph

from support.scores.graph import BACKENDS, FeatureGraph
from support.scores.graph_def import constant, parse_graph
from support.scores.image_sets import array_images
from support.scores.measures import Manifold, frechet_distance, inception_score, precision_recall
from support.scores.references import KEYS, measure
from support.scores.tensorflow_start import import_tensorflow
from support.scores.torch_graph import OPERATIONS, TorchGraph

tf = import_tensorflow()
ops = tf.raw_ops


def numbers(generator, *shape):
    return generator.standard_normal(shape).astype(np.float32)


def in_both(build, images, change=lambda definition: None):
    """What the graph that `build` adds to a placeholder gives in TensorFlow and in torch."""
    with tf.Graph().as_default() as graph:
        image = tf.compat.v1.placeholder(tf.float32, [None] * images.ndim, name="image")
        tf.identity(build(image), name="end")
    definition = graph.as_graph_def()
    change(definition)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(definition, name="")
        expected = session.run("end:0", {"image:0": images})
    parsed = parse_graph(definition.SerializeToString())
    (found,) = TorchGraph(parsed, "image", ["end"], "cpu").run(images)
    return found, expected


def window(generator, kind):
    """Strides and padding of a random window, and height and width for images it fits."""
    strides = [1, *generator.integers(1, 4, 2).tolist(), 1]
    height, width = generator.integers(7, 16, 2).tolist()
    return {"strides": strides, "padding": kind}, height, width


def conv(generator, kind):
    where, height, width = window(generator, kind)
    rows, columns = generator.integers(1, 6, 2).tolist()
    groups = int(generator.choice([1, 3]))
    if kind == "EXPLICIT":
        pads = generator.integers(0, 3, 4).tolist()
        where["explicit_paddings"] = [0, 0, *pads, 0, 0]
    if where["strides"] == [1, 1, 1, 1] and groups == 1:
        where["dilations"] = [1, 2, 1, 1]
        rows = min(rows, 3)
    filters = numbers(generator, rows, columns, 6 // groups, 9)
    images = numbers(generator, 2, height, width, 6)
    return images, lambda x: ops.Conv2D(input=x, filter=filters, **where)


def pool(operation):
    def make(generator, kind):
        where, height, width = window(generator, kind)
        size = [1, *generator.integers(1, 6, 2).tolist(), 1]
        images = numbers(generator, 2, height, width, 5) - 3  # so that padding would show
        argument = "input" if operation is ops.MaxPool else "value"
        return images, lambda x: operation(**{argument: x}, ksize=size, **where)

    return make


def resize(generator, kind):
    height, width, *size = generator.integers(1, 20, 4).tolist()
    images = numbers(generator, 2, height, width, 3)
    options = {kind: True} if kind else {}
    return images, lambda x: ops.ResizeBilinear(images=x, size=size, **options)


WINDOWED = [
    *[(conv, kind) for kind in ("SAME", "VALID", "EXPLICIT")],
    *[(pool(op), kind) for op in (ops.MaxPool, ops.AvgPool) for kind in ("SAME", "VALID")],
    *[(resize, kind) for kind in ("", "align_corners", "half_pixel_centers")],
]


@pytest.mark.parametrize(("make", "kind"), WINDOWED)
def test_windows_of_any_size_stride_and_padding_give_what_tensorflow_gives(make, kind):
    generator = np.random.default_rng(0)
    for _ in range(25):
        images, build = make(generator, kind)
        found, expected = in_both(build, images)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


PARAMETERS = {  # of a batch normalisation of 6 channels
    key: np.linspace(low, 2, 6).astype(np.float32)
    for key, low in {"mean": -1, "variance": 0.5, "beta": -0.7, "gamma": 0.2}.items()
}


def fused_norm(x):
    mean, variance, offset, scale = PARAMETERS.values()
    given = {"mean": mean, "variance": variance, "offset": offset, "scale": scale}
    return ops.FusedBatchNormV3(x=x, **given, is_training=False, epsilon=0.01)[0]


def conv_3x3(x):
    filters = numbers(np.random.default_rng(2), 3, 3, 6, 6)
    return ops.Conv2D(input=x, filter=filters, strides=[1, 1, 1, 1], padding="SAME")


def flat(x, *shape):
    return ops.Reshape(tensor=x, shape=shape)


def twice(x):
    """A convolution whose result is also used before the ReLU."""
    y = conv_3x3(x)
    return y + ops.Relu(features=y)


OTHERS = {
    "Add": lambda x: ops.Add(x=x, y=x),
    "AddV2": lambda x: ops.AddV2(x=x, y=np.float32(2)),
    "BiasAdd": lambda x: ops.BiasAdd(value=x, bias=np.arange(6, dtype=np.float32)),
    "Sub": lambda x: ops.Sub(x=np.float32(1), y=x),
    "Mul": lambda x: ops.Mul(x=x, y=np.arange(6, dtype=np.float32)),
    "RealDiv": lambda x: ops.RealDiv(x=x, y=np.float32(3)),
    "Relu": lambda x: ops.Relu(features=x),
    "Softmax": lambda x: ops.Softmax(logits=x),
    "Identity": lambda x: ops.Identity(input=x),
    "CheckNumerics": lambda x: ops.CheckNumerics(tensor=x, message=""),
    "StopGradient": lambda x: ops.StopGradient(input=x),
    "ExpandDims": lambda x: ops.ExpandDims(input=x, axis=-2),
    "Squeeze": lambda x: ops.Squeeze(input=ops.ExpandDims(input=x, axis=1), axis=[1]),
    "Squeeze of all": lambda x: ops.Squeeze(input=ops.ExpandDims(input=x, axis=1)),
    "Mean": lambda x: ops.Mean(input=x, axis=[1, 2], keep_dims=True),
    "Mean of one": lambda x: ops.Mean(input=x, axis=-1),
    "Reshape": lambda x: flat(x, -1, 6),
    "MatMul": lambda x: ops.MatMul(a=flat(x, -1, 6), b=np.eye(6, 4, dtype=np.float32)),
    "MatMul of transposes": lambda x: ops.MatMul(
        a=flat(x, 6, -1), b=np.eye(4, 6, dtype=np.float32), transpose_a=True, transpose_b=True
    ),
    "Concat": lambda x: ops.Concat(concat_dim=3, values=[x, x + 1]),
    "ConcatV2": lambda x: ops.ConcatV2(values=[x, x + 1], axis=1),
    "FusedBatchNormV3": fused_norm,
    "convolution, norm and ReLU": lambda x: ops.Relu(features=fused_norm(conv_3x3(x))),
    "convolution and two norms": lambda x: fused_norm(fused_norm(conv_3x3(x))),
    "convolution, ReLU and norm": lambda x: fused_norm(ops.Relu(features=conv_3x3(x))),
    "convolution of two users": twice,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_operations_give_what_tensorflow_gives(name):
    images = numbers(np.random.default_rng(1), 3, 5, 7, 6)
    found, expected = in_both(OTHERS[name], images)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_scaled", [True, False])
@pytest.mark.parametrize("after", [lambda x: x, conv_3x3], ids=["alone", "of a convolution"])
def test_batch_normalisation_of_2015_gives_what_tensorflow_gives(after, is_scaled):
    def into_old_norm(definition):
        definition.versions.producer = 8  # the last version that has it
        node = next(node for node in definition.node if node.name == "norm")
        node.op = "BatchNormWithGlobalNormalization"
        node.input.extend(PARAMETERS)
        node.attr["variance_epsilon"].f = 0.001
        node.attr["scale_after_normalization"].b = is_scaled

    def build(x):
        for key, value in PARAMETERS.items():
            tf.constant(value, name=key)
        return ops.Relu(features=ops.Identity(input=after(x), name="norm"))

    images = numbers(np.random.default_rng(1), 3, 5, 7, 6)
    found, expected = in_both(build, images, into_old_norm)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_every_operation_in_the_table_is_tested():
    windowed = {"Const", "Conv2D", "MaxPool", "AvgPool", "ResizeBilinear"}
    earlier = {"FusedBatchNorm", "FusedBatchNormV2"}  # versions with the same meaning
    assert {*OTHERS} & {*OPERATIONS} | windowed | earlier == {*OPERATIONS} - {
        "BatchNormWithGlobalNormalization"
    }


@pytest.mark.parametrize(
    "value",
    [
        np.float32(3),
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.zeros((2, 2), np.float64),
        np.full((3, 4), 7, np.int64),
        np.array([True, False]),
    ],
)
def test_constants_are_read_however_they_are_stored(value):
    proto = tf.make_tensor_proto(value)
    node = tf.compat.v1.NodeDef(name="c", op="Const")
    node.attr["value"].tensor.CopyFrom(proto)
    graph = tf.compat.v1.GraphDef(node=[node])
    found = constant(parse_graph(graph.SerializeToString()).nodes["c"])
    assert found.dtype == value.dtype
    np.testing.assert_array_equal(found, value)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    return write_inception_graph(tmp_path_factory.mktemp("graph") / "inception.pb")


def test_graph_of_inceptions_structure_gives_the_same_five_scores_in_both(inception):
    generator = np.random.default_rng(3)
    smooth = generator.integers(0, 256, (2, 12, 6, 6, 3)).astype(np.uint8)
    samples, reference = smooth.repeat(9, axis=2).repeat(9, axis=3)
    scores, features = [], []
    for backend in BACKENDS:
        graph = FeatureGraph(inception, samples.shape[1:], backend=backend)
        assert graph.is_inception
        ours, theirs = (measure(array_images("a", x), graph) for x in (samples, reference))
        balls = (Manifold.of(measured.features) for measured in (ours, theirs))
        features.append(ours.features)
        scores.append(
            [
                inception_score(ours.features, graph.class_weights),
                *(frechet_distance(ours.statistics[k], theirs.statistics[k]) for k in KEYS),
                *precision_recall(*balls),
            ]
        )
    assert np.abs(features[0] - features[1]).max() < 1e-4 * features[0].std()
    assert scores[0] == pytest.approx(scores[1], rel=1e-4, abs=1e-4)
    assert scores[0][0] > 1.005  # not all images are of one class
    assert scores[0][1] > 1  # sets that differ
