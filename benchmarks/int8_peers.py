"""Makes the int8 model of another toolkit, for `compress.py`; run by the Python of that toolkit's own environment.

    python int8_peers.py TOOLKIT SOURCE OUT

SOURCE is an ONNX file; for `optimum` a Hugging Face directory. OUT is a folder that gets `model.onnx`. What each needs:

    onnxruntime   pip install onnxruntime onnx
    inc           pip install neural-compressor onnx-neural-compressor    (Intel Neural Compressor)
    olive         pip install olive-ai
    optimum       pip install 'optimum-onnx[onnxruntime]' 'transformers<5' torch
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path


def onnxruntime(source: Path, out: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    del model.graph.value_info[:]  # shapes that the exporter wrote for other matrices than are left
    onnx.save(model, out / "plain.onnx")
    quantize_dynamic(out / "plain.onnx", out / "model.onnx", per_channel=True, weight_type=QuantType.QInt8)
    (out / "plain.onnx").unlink()


def inc(source: Path, out: Path) -> None:
    from onnx_neural_compressor.quantization import config, quantize

    quantize(str(source), str(out / "model.onnx"), config.DynamicQuantConfig())


def olive(source: Path, out: Path) -> None:
    from olive.workflows import run

    shape = json.loads((source.parent / "config.json").read_text())
    fuse = {
        "type": "OrtTransformersOptimization",
        "model_type": "bert",
        "num_heads": shape["num_attention_heads"],
        "hidden_size": shape["hidden_size"],
    }
    run(
        {
            "input_model": {"type": "ONNXModel", "model_path": str(source)},
            "passes": {"fuse": fuse, "quantize": {"type": "OnnxDynamicQuantization", "per_channel": True}},
            "output_dir": str(out),
            "cache_dir": str(out / "cache"),
            "log_severity_level": 3,
        }
    )


def optimum(source: Path, out: Path) -> None:
    from optimum.onnxruntime import ORTModelForSequenceClassification, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    ORTModelForSequenceClassification.from_pretrained(source, export=True).save_pretrained(out / "fp32")
    chosen = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    ORTQuantizer.from_pretrained(out / "fp32").quantize(save_dir=out, quantization_config=chosen)
    (out / "model_quantized.onnx").rename(out / "model.onnx")


TOOLKITS: dict[str, Callable[[Path, Path], None]] = {one.__name__: one for one in (onnxruntime, inc, olive, optimum)}

if __name__ == "__main__":
    TOOLKITS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
