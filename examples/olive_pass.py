"""The rewriter as a pass of Olive: it goes into a workflow beside Olive's own passes.

pip install olive-ai requests
python examples/olive_pass.py exported/model.onnx int4
"""

from __future__ import annotations

import sys
from pathlib import Path

from olive.hardware import DEFAULT_CPU_ACCELERATOR, AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.passes import Pass
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pass_config import BasePassConfig, PassConfigParam

import rewriter


class MoeRewriter(Pass):
    """Rewrites an ONNX model by a rule set."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            "rules": PassConfigParam(type_=str, default_value="moe-int4", description="Rule set, or a YAML file."),
            "target": PassConfigParam(type_=str, default_value="cpu", description="Runtime to rewrite for."),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        path = Path(resolve_onnx_path(output_model_path))
        rewriter.apply(model.model_path, rules=config.rules, target=config.target).save(path, overwrite=True)
        return ONNXModelHandler(model_path=str(path))


if __name__ == "__main__":
    source, output = sys.argv[1:3]
    own = create_pass_from_dict(MoeRewriter, {"rules": "moe-int4"}, accelerator_spec=DEFAULT_CPU_ACCELERATOR)
    print(own.run(ONNXModelHandler(model_path=source), output).model_path)
