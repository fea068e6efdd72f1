"""The C header of a compiled model, for C99 and C++."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cnnc.backends.host.device import DeviceCode
from cnnc.backends.host.program import ABI, DTYPES, Port, Program, Variant

_TEMPLATE = """\
/* {title}, compiled by cnnc.
 *
{ports}
 *
 * Link with the shared library, or with the object and -lm -lpthread.  A context is used by one thread at a time;
 * each thread that wants to run the model creates its own.  Weights are shared between contexts.
 * Tensors are dense and row-major.  {memory}
 */
#ifndef {guard}
#define {guard}

#include <stdint.h>

#ifdef __cplusplus
extern "C" {{
#endif

#define {p}_ABI_VERSION {abi}
#define {p}_INPUT_COUNT {input_count}
#define {p}_OUTPUT_COUNT {output_count}
{sizes}{batch_sizes}
/* What the functions return; code / 100 is the class: 2 wrong call, 3 invalid data, 5 limit, 6 environment,
 * 7 self-check, 70 bug. */
enum {p}_error {{
  {p}_OK = 0,
  {p}_ERROR_NULL = 201,         /* a pointer is null */
  {p}_ERROR_THREADS = 202,      /* threads is not 0 to 1024 */
  {p}_ERROR_CONTEXT = 203,      /* destroyed, or not a context of this model */
  {p}_ERROR_BUSY = 204,         /* another thread is using the context */
  {p}_ERROR_OVERLAP = 205,      /* two outputs overlap */
{batch_error}  {p}_ERROR_VALUE = 301,        /* an index or size computed at run time is out of range */
  {p}_ERROR_TOO_MANY = 501,     /* 1024 contexts are alive */
  {p}_ERROR_MEMORY = 601,       /* not enough memory */
  {p}_ERROR_START_THREAD = 602, /* a thread cannot be started */
  {p}_ERROR_DRIVER = 603,       /* CUDA's driver is missing or too old */
  {p}_ERROR_NO_GPU = 604,       /* the driver shows no GPU */
  {p}_ERROR_GPU_MEMORY = 605,   /* not enough memory on the GPU */
  {p}_ERROR_GPU = 606,          /* the GPU or its driver failed; the error text tells how */
  {p}_ERROR_FORKED = 607,       /* a GPU's context is used in a child of the process that made it */
  {p}_ERROR_CPU = 701,          /* the CPU lacks a feature; the error text names it */
  {p}_ERROR_GPU_ARCH = 702,     /* the kernels are for another GPU */
  {p}_ERROR_KERNEL = 7001       /* a bug of cnnc */
}};

enum {p}_dtype {{
{dtypes}
}};

typedef struct {p}_context {p}_context;

typedef struct {p}_tensor_info {{
  const char *name; /* as in the model */
  int32_t dtype;    /* enum {p}_dtype */
  int32_t rank;
  const int64_t *dims;
  uint64_t bytes;
}} {p}_tensor_info;

typedef struct {p}_kernel_info {{
  const char *symbol;
  const char *const *layers; /* the model's layers this kernel computes */
  int32_t layer_count;
  int32_t slices;
  uint64_t flops; /* of one run */
  uint64_t bytes;
  const char *algorithm;
  const char *schedule;
}} {p}_kernel_info;

/* Makes a context; threads = 0 takes as many as the process may use. */
int {p}_create(int threads, {p}_context **context);

/* Reads the inputs and writes the outputs, in the order of {p}_input and {p}_output.  The result does
 * not depend on the number of threads.  After ERROR_VALUE, ERROR_GPU and ERROR_KERNEL the outputs hold nothing of use,
 * after any other error they are as before; the context can be used again. */
int {p}_run({p}_context *context, const void *const *inputs, void *const *outputs);

/* Frees a context; null is allowed. */
int {p}_destroy({p}_context *context);

/* The text of an error code: never null, never to be freed. */
const char *{p}_error_text(int code);

/* Names and shapes; null if there is no such index. */
int {p}_input_count(void);
int {p}_output_count(void);
const {p}_tensor_info *{p}_input(int index);
const {p}_tensor_info *{p}_output(int index);

/* The threads a context runs with; 0 if it is not a context or is busy. */
int {p}_threads({p}_context *context);

/* Switches the clocks of the kernels on, from zero, or off. */
int {p}_profile({p}_context *context, int on);
int {p}_kernel_count(void);
const {p}_kernel_info *{p}_kernel(int index);

/* Nanoseconds spent in a kernel since the clocks were switched on; *calls (may be null) gets how often it ran. */
uint64_t {p}_kernel_ns({p}_context *context, int index, uint64_t *calls);

/* Facts about the model and how it was compiled, as JSON. */
const char *{p}_meta(void);

{stream_functions}{batch_functions}\
/* The version of this interface: equal to {p}_ABI_VERSION if header and library fit. */
int {p}_abi_version(void);

#ifdef __cplusplus
}}
#endif

#endif
"""

_BATCH_ERROR = "  {p}_ERROR_BATCH = 206,        /* the model was not compiled for this batch size */\n"

_BATCH_FUNCTIONS = """\
/* The batch sizes this was compiled for; 0 if there is no such index. */
int {p}_batch_count(void);
int {p}_batch_at(int index);

/* Each is what its namesake without `batch`, which is for the first batch size, is for another; those that give
 * something give null or 0 for a batch size that is not there.  A context runs any of them, in any order. */
int {p}_run_batch({p}_context *context, int batch, const void *const *inputs, void *const *outputs);
const {p}_tensor_info *{p}_batch_input(int batch, int index);
const {p}_tensor_info *{p}_batch_output(int batch, int index);
int {p}_batch_kernel_count(int batch);
const {p}_kernel_info *{p}_batch_kernel(int batch, int index);
uint64_t {p}_batch_kernel_ns({p}_context *context, int batch, int index, uint64_t *calls);
{batch_stream_function}
"""

_STREAM_FUNCTIONS = """\
/* Puts a run into a stream of CUDA and returns.  `stream` is a CUstream or cudaStream_t of the first GPU, null its
 * default stream.  Inputs and outputs, in memory of the GPU or in page-locked memory of the host, belong to the run
 * until the stream has done it; copies from and to other memory of the host hold up the call.  Runs of one context
 * follow one another, whatever streams they are in; for runs side by side make several contexts.  The clocks of the
 * kernels do not count these runs. */
int {p}_run_async({p}_context *context, const void *const *inputs, void *const *outputs, void *stream);

/* Waits for all runs of a context.  ERROR_VALUE here, or from {p}_run, also stands for runs in streams before. */
int {p}_wait({p}_context *context);

"""

_BATCH_STREAM_FUNCTION = """\
int {p}_run_batch_async({p}_context *context, int batch, const void *const *inputs, void *const *outputs,
    void *stream);
"""


_IN_PLACE = "Data aligned to 64 bytes is used in place, other data is copied."
_ON_GPU = """\
The kernels run on the first GPU: one of compute capability {capability}
 * {or_else}.  CUDA's
 * driver is loaded when the first context is made (the object needs -ldl too).  Each input and output may be in memory
 * of the host or of the GPU: they are copied to the context's own memory and back.  The number of threads changes
 * nothing."""


def emit_header(program: Program) -> str:
    """Return the text of the header; names from the model appear in comments only, reduced to harmless characters."""
    prefix = program.prefix
    several = program.variants if program.others else ()
    ports = _port_lines(program.variants[0])
    for variant in several[:1]:
        ports[:0] = [f"for batch size {variant.batch}, the first of {', '.join(str(v.batch) for v in several)}"]
    for variant in several[1:]:
        ports += [f"for batch size {variant.batch}", *_port_lines(variant)]
    dtypes = [f"  {prefix}_{name.upper()} = {number}" for name, (number, _) in DTYPES.items()]
    return _TEMPLATE.format(
        p=prefix,
        title=_harmless(program.name),
        memory=_memory(program.device),
        guard=f"CNNC_{prefix}_H",
        abi=ABI,
        ports="\n".join(f" * {line}" for line in ports) or " * no inputs, no outputs",
        input_count=len(program.inputs),
        output_count=len(program.outputs),
        sizes=_size_lines(prefix, program.variants[0]),
        batch_sizes=_batch_size_lines(prefix, several),
        batch_error=_BATCH_ERROR.format(p=prefix) if several else "",
        stream_functions=_STREAM_FUNCTIONS.format(p=prefix) if program.device else "",
        batch_functions=_batch_functions(program),
        dtypes=",\n".join(dtypes),
    )


def _memory(device: DeviceCode | None) -> str:
    """Say where kernels run, and where inputs and outputs may be."""
    if device is None:
        return _IN_PLACE
    major, minor = device.capability
    or_else = "and no other"
    if device.portable:
        or_else = "or of a higher one with the same first digit, or a newer one, whose driver compiles the kernels once"
    return _ON_GPU.format(capability=f"{major}.{minor}", or_else=or_else)


def _batch_functions(program: Program) -> str:
    """Declare what a model for several batch sizes has besides."""
    if not program.others:
        return ""
    asynchronous = _BATCH_STREAM_FUNCTION.format(p=program.prefix) if program.device else ""
    return _BATCH_FUNCTIONS.format(p=program.prefix, batch_stream_function=asynchronous)


def _port_lines(variant: Variant) -> list[str]:
    inputs = [f"input {i}: {_comment(port)}" for i, port in enumerate(variant.inputs)]
    return inputs + [f"output {i}: {_comment(port)}" for i, port in enumerate(variant.outputs)]


def _size_lines(prefix: str, variant: Variant) -> str:
    lines = [f"#define {prefix}_INPUT_{i}_BYTES {port.nbytes}\n" for i, port in enumerate(variant.inputs)]
    lines += [f"#define {prefix}_OUTPUT_{i}_BYTES {port.nbytes}\n" for i, port in enumerate(variant.outputs)]
    return "".join(lines)


def _batch_size_lines(prefix: str, variants: Sequence[Variant]) -> str:
    """Write the sizes for each of several batch sizes."""
    if not variants:
        return ""
    sizes = [_size_lines(f"{prefix}_BATCH_{variant.batch}", variant) for variant in variants]
    return f"#define {prefix}_BATCH_COUNT {len(variants)}\n" + "".join(sizes)


def _comment(port: Port) -> str:
    shape = ",".join(map(str, port.shape))
    return f"{_harmless(port.name)} {port.dtype}[{shape}]"


def _harmless(name: str) -> str:
    """Return a name fit for a C comment: no end of comment, line break, backslash or trigraph can be in it."""
    reduced = re.sub(r"[^A-Za-z0-9_.:\-]+", "_", name, flags=re.ASCII)
    return reduced[:100] or "_"
