"""The passes from a scheduled kernel to device functions as TVM's CUDA generator takes them, and the host's calls."""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx

from cnnc.backends.cuda.codegen import tvm_target
from cnnc.backends.lower import vector_math
from cnnc.backends.lower.flatten import flatten_buffers
from cnnc.backends.lower.loops import WRITTEN_LOOPS
from cnnc.backends.lower.temporaries import bind_lets
from cnnc.target import Target

_DEVICE_KERNEL = 2
"""The calling convention TVM gives to functions that are launched."""


def lower_to_device(func: Any, symbol: str, target: Target, noalias: bool) -> tuple[Any, Any]:
    """Give the host's function, which allocates and launches, and the module of the functions it launches."""

    def without_aliases(device_function: Any) -> Any:
        return device_function.with_attr("tirx.noalias", noalias)

    vector_math.register()
    mod = tvm.IRModule({symbol: func.with_attr("global_symbol", symbol)})
    with tvm.transform.PassContext(opt_level=3):
        mod = tirx.transform.BindTarget(tvm_target(target))(mod)
        mod = tvm.transform.Sequential(_passes(written=bool(func.attrs.get(WRITTEN_LOOPS))))(mod)
        launched = {var: f for var, f in mod.functions.items() if f.attrs.get("calling_conv") == _DEVICE_KERNEL}
        device = tvm.transform.Sequential(_device_passes())(tvm.IRModule(launched))
    # Splitting gives every device function the attribute, whatever it was split from.
    return mod[symbol], _each(device, without_aliases)


def _passes(written: bool) -> list[Any]:
    """List the steps to device functions: those of TVM's pipeline that kernels need, in its order.

    `written` ones hand addresses of buffers to functions: TVM must not make a buffer as small as what it sees read.
    """
    schedule, loops = s_tir.transform, tirx.transform
    scheduled = [
        schedule.CanonicalizeLoop(),
        schedule.LowerCrossThreadReduction(),
        schedule.LowerInitBlock(),
        schedule.PlanAndUpdateBufferAllocationLocation(),
        schedule.ConvertBlocksToOpaque(),
        schedule.LiftThreadBinding(),
        schedule.CompactBufferAllocation(),
        schedule.UnifyThreadBinding(),
        schedule.LowerMatchBuffer(),
        schedule.StmtSimplify(),
        schedule.AnnotateIrregularLoop(),
        schedule.LowerOpaqueBlock(),
    ]
    return [
        *(() if written else scheduled),
        _module_pass("cnnc.FlattenBuffers", flatten_buffers),
        loops.BF16ComputeLegalize(),
        loops.NarrowDataType(32),
        schedule.LoopPartition(),
        loops.VectorizeLoop(True),
        loops.StorageRewrite(),
        schedule.HoistIfThenElse(),
        loops.UnrollLoop(),
        schedule.RenormalizeSplitPattern(),
        loops.StmtSimplify(),
        loops.RemoveNoOp(),
        schedule.RewriteUnsafeSelect(),
        loops.CommonSubexprElim(),
        loops.VerifyMemory(),
        schedule.ThreadSync("shared"),
        schedule.ThreadSync("shared.dyn"),
        schedule.ThreadSync("warp"),
        schedule.LowerThreadAllreduce(),
        schedule.MergeSharedMemoryAllocations(),
        loops.SplitHostDevice(),
    ]


def _device_passes() -> list[Any]:
    """List the steps from device functions to what can be printed as CUDA."""
    loops = tirx.transform
    return [
        loops.LowerWarpMemory(),
        loops.StmtSimplify(),
        loops.LowerIntrin(),
        _module_pass("cnnc.BindLets", lambda mod: _each(mod, bind_lets)),
        _module_pass("cnnc.Extremes", lambda mod: _each(mod, _exact_extremes)),
    ]


def _module_pass(name: str, function: Any) -> Any:
    return tvm.transform.module_pass(lambda mod, _: function(mod), opt_level=0, name=name)


def _each(mod: Any, function: Any) -> Any:
    return tvm.IRModule({var: function(func) for var, func in mod.functions.items()})


def _exact_extremes(func: Any) -> Any:
    """Write maxima and minima of floats as calls that give the second operand where either is NaN.

    That is what TVM's mean on a CPU, and what operators rely on; CUDA's give the one that is no NaN.
    """

    def rewrite(name: str) -> Any:
        def call(node: Any) -> Any:
            dtype = str(node.ty.dtype)
            return tirx.call_pure_extern(dtype, name, node.a, node.b) if "float" in dtype else node

        return call

    rules = [(tirx.Max, rewrite("cnnc_max")), (tirx.Min, rewrite("cnnc_min"))]
    return func.with_body(tvm_ffi.structural_map(func.body, rules, order="post"))
