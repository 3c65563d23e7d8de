"""A trained network as an ONNX graph: pictures of any size in, calibrated probabilities and features out."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load as load_arrays
from torch import Tensor, nn
from torch.nn import functional as F

from finetune101.config import Preprocessing
from finetune101.errors import Refused, shortened
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.evaluation.unlike import PROBABILITY
from finetune101.standalone import PICTURES, RESIZED, ResizeWeights, resize_weights

OPSET = 18  # the first whose Resize filters as Pillow does (antialias)
IR_VERSION = 10  # what runtimes of 2024 read
OUTPUTS = ("probabilities", "features", "unlike")
"""The names of the outputs; the last only of a network with a score for unlike images (see ``evaluation.unlike``)."""
FEW = 1024  # numbers: below, half precision saves nothing
MEANS = "class_means"
"""The name of the score's parameters."""


class Classifier(nn.Module):
    """uint8 (N, 3, size, size) RGB -> probabilities (N, classes) over the temperature, features (N, D), scores (N,).

    In float32. The scores are those of ``evaluation.unlike``, and are left out where the network has none.
    """

    def __init__(self, network: TrainedNetwork) -> None:
        super().__init__()
        self.model = copy.deepcopy(network.model).cpu().eval()
        self.model.to(memory_format=torch.contiguous_format)  # torch.export.save warns of another one
        for module in self.model.modules():  # the exporter takes several times as long for layers that write in place
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]
        self.output_layer = network.head
        self.temperature = network.temperature or 1.0
        own = network.preprocessing
        self.mean, self.std = (nn.Buffer(torch.tensor(value).view(3, 1, 1) * 255) for value in (own.mean, own.std))

        means = network.unlike.means if network.unlike else None
        self.class_means = None if means is None else nn.Buffer(torch.from_numpy(means.astype(np.float32)))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        inputs: list[Tensor] = []
        layer = self.model.get_submodule(self.output_layer)
        hook = layer.register_forward_pre_hook(lambda _, values: inputs.append(values[0]))
        try:
            logits = self.model((pixels.to(torch.float32) - self.mean) / self.std)
        finally:
            hook.remove()
        features = inputs[0].mean((2, 3)) if inputs[0].dim() == 4 else inputs[0]  # a convolution, before the pooling
        probabilities = torch.softmax(logits / self.temperature, 1)
        if self.class_means is None:
            return probabilities, features
        zeros = torch.zeros(len(self.class_means))  # with a bias the weights stay as they are in the graph
        cosine = F.linear(F.normalize(features, dim=1), self.class_means, zeros).amax(1)
        certain = torch.softmax(logits, 1).amax(1)
        return probabilities, features, 1 - cosine + PROBABILITY * (1 - certain)


def program(network: TrainedNetwork) -> torch.export.ExportedProgram:
    """``Classifier`` of ``network`` for any number of images, as PyTorch's own format."""
    size = network.preprocessing.size
    example = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    with _quiet(), _refused(network.architecture):
        return torch.export.export(
            Classifier(network).eval(), (example,), dynamic_shapes=({0: torch.export.Dim("N", min=1, max=4096)},)
        )


def onnx_graph(network: TrainedNetwork, fused: bool = True) -> onnx.ModelProto:
    """``Classifier`` of ``network`` as ONNX (opset 18); its input is ``RESIZED``, uint8 (N, 3, size, size).

    Without ``fused`` batch norm stays a layer of its own, and every weight is one of the checkpoint, named "model." +
    its name there.
    """
    exporting = program(network)
    with _quiet(), _refused(network.architecture):
        exported = torch.onnx.export(
            exporting, input_names=[RESIZED], output_names=list(OUTPUTS[: 3 if network.unlike else 2]),
            opset_version=OPSET, dynamo=True, verbose=False, optimize=fused,
        )  # fmt: skip
        assert exported is not None
        if not fused:
            _fold_constants(exported.model)
        graph: onnx.ModelProto = exported.model_proto
    graph.ir_version = min(graph.ir_version, IR_VERSION)
    for node in graph.graph.node:  # file names and lines of this machine
        del node.metadata_props[:]
        node.doc_string = ""
    del graph.graph.value_info[:]  # shapes that runtimes find themselves
    for value in [*graph.graph.input, *graph.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    onnx.checker.check_model(graph, full_check=True)
    return graph


def _fold_constants(model: Any) -> None:
    """Makes ``model`` (of onnx_ir) small without fusing its layers."""
    from onnx_ir.passes.common import LiftConstantsToInitializersPass, NameFixPass
    from onnxscript import optimizer

    optimizer.inline(model)
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    NameFixPass()(model)  # a constant and a value may have one name


def stored_in(graph: onnx.ModelProto, files: Sequence[tuple[Path, Mapping[str, str]]]) -> None:
    """Makes ``graph`` read its constants from safetensors files beside it, in their precision, cast when it is loaded.

    ``files`` holds each file with the name of a constant for each of its tensors. Raises ValueError where a tensor does
    not hold the values of its constant.
    """
    constants, casts = {one.name: one for one in graph.graph.initializer}, []
    for file, names in files:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        tensors, arrays = json.loads(content[8 : 8 + length]), load_arrays(content)
        for tensor, name in names.items():
            constant, values = constants[name], arrays[tensor]
            if not np.array_equal(numpy_helper.to_array(constant), values.astype(np.float32)):
                raise ValueError(f"{file} holds other values for {name}")
            begin, end = tensors[tensor]["data_offsets"]
            place = {"location": file.name, "offset": str(8 + length + begin), "length": str(end - begin)}
            half = values.dtype == np.float16
            constant.Clear()
            constant.name = f"{name}_half" if half else name
            constant.data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
            constant.data_location = TensorProto.EXTERNAL
            constant.dims.extend(values.shape)
            constant.external_data.extend(onnx.StringStringEntryProto(key=k, value=word) for k, word in place.items())
            if half:
                casts.append(helper.make_node("Cast", [constant.name], [name], to=TensorProto.FLOAT))
    _prepend(graph, casts)


def _prepend(graph: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    body = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend([*nodes, *body])


def prepend_resize(graph: onnx.ModelProto, preprocessing: Preprocessing) -> None:
    """Makes the input of ``graph`` pictures of any size, by what ``data.decode`` and ``batches.resized`` do to them.

    The new input is ``PICTURES``, RGB pictures of one size. Whole picture -> cache_size -> size, each by Pillow's
    filter; a picture of ``size`` skips both.
    """
    size, cached = preprocessing.size, preprocessing.cache_size
    filters: dict[str, Any] = {"mode": "linear"}
    if preprocessing.interpolation == "bicubic":
        filters = {"mode": "cubic", "cubic_coeff_a": -0.5}
    filters |= {"antialias": 1, "exclude_outside": 1, "coordinate_transformation_mode": "half_pixel"}
    make = helper.make_node
    constants = {"resize_first": np.array([3, cached, cached], np.int64)}
    decode = [
        make("Shape", [PICTURES], ["resize_count"], start=0, end=1),
        make("Concat", ["resize_count", "resize_first"], ["resize_shape"], axis=0),
        make("Resize", ["resize_channels", "", "", "resize_shape"], ["resize_decoded"], **filters),
    ]
    nodes = [make("Transpose", [PICTURES], ["resize_channels"], perm=[0, 3, 1, 2])]
    if cached == size:
        decode[-1].output[0] = RESIZED
        nodes += decode
    else:
        second, more = _second_resize(resize_weights(cached, size, preprocessing.interpolation))
        constants |= more | {"resize_own": np.array([size, size], np.int64)}
        nodes += [
            make("Shape", [PICTURES], ["resize_sides"], start=1, end=3),
            make("Equal", ["resize_sides", "resize_own"], ["resize_equal"]),
            make("Cast", ["resize_equal"], ["resize_numbers"], to=TensorProto.INT64),
            make("ReduceMin", ["resize_numbers"], ["resize_both"], keepdims=0),
            make("Cast", ["resize_both"], ["resize_is_own"], to=TensorProto.BOOL),
        ]
        as_it_is = [make("Identity", ["resize_channels"], ["resize_same"])]
        branches = {"then_branch": (as_it_is, "resize_same"), "else_branch": ([*decode, *second], "resize_other")}
        graphs = {
            key: helper.make_graph(
                part, key, [], [helper.make_tensor_value_info(name, TensorProto.UINT8, ["N", 3, size, size])]
            )
            for key, (part, name) in branches.items()
        }
        nodes.append(make("If", ["resize_is_own"], [RESIZED], **graphs))
    graph.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    _prepend(graph, nodes)
    del graph.graph.input[:]
    graph.graph.input.append(helper.make_tensor_value_info(PICTURES, TensorProto.UINT8, ["N", "H", "W", 3]))
    onnx.checker.check_model(graph, full_check=True)


def _second_resize(weights: ResizeWeights) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Nodes from "resize_decoded" to "resize_other" as ``standalone.resize_pixels`` computes it, and constants."""
    make, kind = helper.make_node, weights.matrix.dtype
    number = helper.np_dtype_to_tensor_dtype(kind)
    constants = {
        "resize_whole": weights.matrix.astype(np.int16),  # they have 15 bits
        "resize_half": np.array(weights.divisor / 2, kind),
        "resize_divisor": np.array(weights.divisor, kind),
        "resize_black": np.array(0, kind),
        "resize_white": np.array(255, kind),
    }

    def rounded(name: str) -> list[onnx.NodeProto]:
        return [
            make("Add", [f"{name}_sums", "resize_half"], [f"{name}_half"]),
            make("Div", [f"{name}_half", "resize_divisor"], [f"{name}_level"]),
            make("Floor", [f"{name}_level"], [f"{name}_floor"]),
            make("Clip", [f"{name}_floor", "resize_black", "resize_white"], [name]),
        ]

    nodes = [
        make("Cast", ["resize_whole"], ["resize_left"], to=number),
        make("Transpose", ["resize_left"], ["resize_right"], perm=[1, 0]),
        make("Cast", ["resize_decoded"], ["resize_real"], to=number),
        make("MatMul", ["resize_real", "resize_right"], ["resize_columns_sums"]),
        *rounded("resize_columns"),
        make("MatMul", ["resize_left", "resize_columns"], ["resize_rows_sums"]),
        *rounded("resize_rows"),
        make("Cast", ["resize_rows"], ["resize_other"], to=TensorProto.UINT8),
    ]
    return nodes, constants


def halve(graph: onnx.ModelProto) -> None:
    """Stores the larger float constants of ``graph`` in half precision; a runtime casts them when it loads the file."""
    constants, casts = graph.graph.initializer, []
    for constant in constants:
        values = numpy_helper.to_array(constant)
        if constant.data_type != TensorProto.FLOAT or values.size < FEW:
            continue
        name = constant.name
        constant.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_half"))
        casts.append(helper.make_node("Cast", [constant.name], [name], to=TensorProto.FLOAT))
    _prepend(graph, casts)


@contextlib.contextmanager
def _refused(name: str) -> Iterator[None]:
    """Turns what the exporter raises, of whatever kind, into a sentence about the network ``name``.

    An assertion of this package that fails is a bug of ours, and keeps its traceback.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, AssertionError) and _is_ours(error):
            raise
        reason = shortened(str(error).strip().split("\n")[0]) or type(error).__name__
        raise Refused(f"{name} cannot be exported ({reason}); take --format safetensors") from error


def _is_ours(error: Exception) -> bool:
    """Whether code of this package raised ``error``."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parents[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own lines and warnings, which name its insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
