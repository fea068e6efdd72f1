/* The command-line program of a compiled model: arrays or pictures in, arrays or the greatest entries out. */
#define _GNU_SOURCE
#include "program.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MODEL cnnc_rt_the_model
#define MAX_PORTS 256
#define MAX_TOP 1000

typedef struct options {
  const char *inputs[MAX_PORTS];
  const char *outputs[MAX_PORTS];
  const char *labels;
  int input_count;
  int output_count;
  int threads;
  int bench; /* runs; 0: none */
  int top;
  int batch; /* 0: that of the inputs */
  cnnc_rt_preprocess how;
} options;

static const char *program_name = "model";

int cnnc_rt_problem(int code, const char *format, ...) {
  va_list list;
  fprintf(stderr, "%s: ", program_name);
  va_start(list, format);
  vfprintf(stderr, format, list);
  va_end(list);
  fputc('\n', stderr);
  return code;
}

/* Names come from the model: nothing in them may steer the terminal. */
static void show(FILE *to, const char *name) {
  for (int i = 0; name[i] != 0 && i < 200; i++) {
    unsigned char c = (unsigned char)name[i];
    fputc(c < 32 || c == 127 ? '?' : c, to);
  }
}

static void show_ports(FILE *to, const char *kind, const cnnc_rt_tensor *ports, int count) {
  char text[256];
  for (int i = 0; i < count; i++) {
    cnnc_rt_describe(&ports[i], text, sizeof text);
    fprintf(to, "%s %d: ", kind, i);
    show(to, ports[i].name);
    fprintf(to, " %s\n", text);
  }
}

static void describe_batches(char *text, size_t size) {
  size_t used = 0;
  for (int i = 0; i < MODEL.variant_count && used < size; i++) {
    int more = snprintf(text + used, size - used, "%s%" PRId32, i ? ", " : "", MODEL.variants[i].batch);
    used += more > 0 ? (size_t)more : size;
  }
}

static int usage(FILE *to) {
  fprintf(to,
          "usage: %s [options] INPUT...\n"
          "  INPUT              a .npy array, or a picture (PNG, JPEG, PPM, PGM), for each input in order\n"
          "  -o FILE            write an output as .npy; repeated for further outputs\n"
          "  --threads N        threads to use; 0, the default, takes all this process may use\n"
          "  --top K            print the K greatest entries of the first output (default 5)\n"
          "  --labels FILE      names of the entries, one a line\n"
          "  --bench [N]        run N times (default 20) and print the times\n"
          "  --resize N         scale the short side of a picture to N before the middle is cut out\n"
          "  --mean A,B,C       what is subtracted from the channels of a picture, of 0 to 1\n"
          "  --std A,B,C        by what they are divided then\n"
          "  --info             print facts about the model as JSON\n",
          program_name);
  if (MODEL.variant_count > 1) {
    char sizes[256];
    describe_batches(sizes, sizeof sizes);
    fprintf(to,
            "  --batch N          run with this batch size (%s); by default that of the inputs\n"
            "shapes for batch size %" PRId32 ":\n",
            sizes, MODEL.variants->batch);
  }
  show_ports(to, "input", MODEL.variants->inputs, MODEL.input_count);
  show_ports(to, "output", MODEL.variants->outputs, MODEL.output_count);
  return to == stdout ? 0 : EXIT_USAGE;
}

/* --- options ------------------------------------------------------------------------------------------------------ */

static bool read_number(const char *text, int least, int most, int *out) {
  char *end;
  errno = 0;
  long value = strtol(text, &end, 10);
  if (end == text || *end != 0 || errno != 0 || value < least || value > most) {
    return false;
  }
  *out = (int)value;
  return true;
}

/* Reads "a,b,c" or "a", which stands for all three; stops at anything else. */
static bool read_triple(const char *text, float *out) {
  char *end;
  int count = 0;
  for (; count < 3; count++) {
    while (*text == ' ') {
      text++;
    }
    out[count] = strtof(text, &end);
    if (end == text || !isfinite(out[count])) {
      return false;
    }
    text = end;
    if (*text != ',') {
      count++;
      break;
    }
    text++;
  }
  if (count == 1) {
    out[1] = out[0];
    out[2] = out[0];
  }
  return count == 1 || count == 3;
}

/* Takes what the compiler left in the JSON: {"preprocess": {"resize": 256, "mean": [..], "std": [..]}}. */
static void read_meta(cnnc_rt_preprocess *how) {
  const char *at = strstr(MODEL.meta, "\"preprocess\"");
  if (at == NULL) {
    return;
  }
  const char *end = strchr(at, '}');
  const char *mean = strstr(at, "\"mean\": [");
  const char *std = strstr(at, "\"std\": [");
  const char *resize = strstr(at, "\"resize\": ");
  if (mean != NULL && mean < end) {
    read_triple(mean + 9, how->mean);
  }
  if (std != NULL && std < end) {
    read_triple(std + 8, how->std);
  }
  if (resize != NULL && resize < end) {
    how->resize = (uint32_t)strtoul(resize + 10, NULL, 10);
  }
}

/* Handles one option; returns how many arguments it took, 0 if it is wrong. */
static int read_option(options *o, char **argument, int left) {
  const char *name = argument[0];
  const char *value = left > 1 ? argument[1] : "";
  int number = 0;
  if (strcmp(name, "--bench") == 0) {
    bool given = read_number(value, 1, 1000000, &o->bench);
    o->bench = given ? o->bench : 20;
    return given ? 2 : 1;
  }
  if (left < 2) {
    return 0;
  }
  if (strcmp(name, "-o") == 0 && o->output_count < MAX_PORTS) {
    o->outputs[o->output_count++] = value;
    return 2;
  }
  if (strcmp(name, "--threads") == 0) {
    return read_number(value, 0, CNNC_RT_MAX_THREADS, &o->threads) ? 2 : 0;
  }
  if (strcmp(name, "--top") == 0) {
    return read_number(value, 0, MAX_TOP, &o->top) ? 2 : 0;
  }
  if (strcmp(name, "--batch") == 0 && MODEL.variant_count > 1) {
    return read_number(value, 1, INT32_MAX, &o->batch) ? 2 : 0;
  }
  if (strcmp(name, "--labels") == 0) {
    o->labels = value;
    return 2;
  }
  if (strcmp(name, "--resize") == 0 && read_number(value, 1, 65536, &number)) {
    o->how.resize = (uint32_t)number;
    return 2;
  }
  if (strcmp(name, "--mean") == 0) {
    return read_triple(value, o->how.mean) ? 2 : 0;
  }
  if (strcmp(name, "--std") == 0) {
    bool good = read_triple(value, o->how.std) && o->how.std[0] > 0 && o->how.std[1] > 0 && o->how.std[2] > 0;
    return good ? 2 : 0;
  }
  return 0;
}

static int read_options(int count, char **arguments, options *o) {
  bool options_end = false;
  for (int i = 1; i < count;) {
    if (options_end || arguments[i][0] != '-') {
      if (o->input_count == MAX_PORTS) {
        return cnnc_rt_problem(EXIT_USAGE, "more than %d inputs", MAX_PORTS);
      }
      o->inputs[o->input_count++] = arguments[i++];
      continue;
    }
    if (strcmp(arguments[i], "--") == 0) {
      options_end = true;
      i++;
      continue;
    }
    int used = read_option(o, arguments + i, count - i);
    if (used == 0) {
      return cnnc_rt_problem(EXIT_USAGE, "cannot use the option %s%s%s; --help lists all", arguments[i],
                             i + 1 < count ? " " : "", i + 1 < count ? arguments[i + 1] : "");
    }
    i += used;
  }
  if (o->input_count != MODEL.input_count || o->output_count > MODEL.output_count) {
    return cnnc_rt_problem(EXIT_USAGE, "the model has %d inputs and %d outputs, given were %d and %d; --help lists them",
                           MODEL.input_count, MODEL.output_count, o->input_count, o->output_count);
  }
  return 0;
}

/* --- files -------------------------------------------------------------------------------------------------------- */

/* Reads a whole file; ends it with a NUL that is not counted. */
static int read_file(const char *path, cnnc_rt_blob *out) {
  struct stat status;
  /* Not to hang on a pipe without a writer. */
  int descriptor = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
  if (descriptor < 0 || fstat(descriptor, &status) != 0) {
    int code = cnnc_rt_problem(EXIT_ENVIRONMENT, "cannot open %s: %s", path, strerror(errno));
    if (descriptor >= 0) {
      close(descriptor);
    }
    return code;
  }
  int code = 0;
  uint64_t size = (uint64_t)status.st_size;
  out->size = 0;
  out->data = NULL;
  if (!S_ISREG(status.st_mode)) {
    code = cnnc_rt_problem(EXIT_INVALID, "%s is not a file", path);
  } else if (size > CNNC_RT_MAX_FILE) {
    code = cnnc_rt_problem(EXIT_LIMIT, "%s is larger than %" PRIu64 " bytes", path, CNNC_RT_MAX_FILE);
  } else if ((out->data = malloc((size_t)size + 1)) == NULL) {
    code = cnnc_rt_problem(EXIT_ENVIRONMENT, "%s: not enough memory", path);
  }
  while (code == 0 && out->size < size) {
    ssize_t got = read(descriptor, out->data + out->size, (size_t)size - out->size);
    if (got < 0) {
      code = cnnc_rt_problem(EXIT_ENVIRONMENT, "cannot read %s: %s", path, strerror(errno));
    } else if (got == 0) {
      break;
    } else {
      out->size += (size_t)got;
    }
  }
  if (out->data != NULL) {
    out->data[out->size] = 0;
  }
  close(descriptor);
  return code;
}

static bool is_npy(const cnnc_rt_blob *file) {
  return file->size >= 6 && memcmp(file->data, "\x93NUMPY", 6) == 0;
}

static int load_input(const char *path, const cnnc_rt_blob *file, const cnnc_rt_tensor *tensor,
                      const cnnc_rt_preprocess *how, void *to) {
  if (is_npy(file)) {
    return cnnc_rt_npy_read(path, file, tensor, to);
  }
  cnnc_rt_picture picture = {0, 0, NULL};
  int code = cnnc_rt_picture_read(path, file, &picture);
  if (code == 0) {
    code = cnnc_rt_picture_fill(path, &picture, tensor, how, to);
  }
  free(picture.rgb);
  return code;
}

/* Whether the files have the leading extents of a batch size; a picture is a batch of one. */
static bool leads(const cnnc_rt_variant *variant, const cnnc_rt_blob *files) {
  for (int i = 0; i < MODEL.input_count; i++) {
    const cnnc_rt_tensor *tensor = &variant->inputs[i];
    int64_t extent = 1;
    /* What is wrong with a damaged array is said when it is read. */
    bool known = !is_npy(&files[i]) || cnnc_rt_npy_leading(&files[i], &extent);
    if (known && tensor->rank > 0 && extent != tensor->dims[0]) {
      return false;
    }
  }
  return true;
}

static int choose_variant(const options *o, const cnnc_rt_blob *files, const cnnc_rt_variant **out) {
  char sizes[256];
  *out = MODEL.variants;
  if (MODEL.variant_count == 1) {
    return 0;
  }
  describe_batches(sizes, sizeof sizes);
  if (o->batch != 0) {
    *out = cnnc_rt_find(o->batch);
    return *out != NULL ? 0 : cnnc_rt_problem(EXIT_USAGE, "--batch %d: compiled for batch sizes %s", o->batch, sizes);
  }
  for (int i = 0; i < MODEL.variant_count; i++) {
    if (leads(&MODEL.variants[i], files)) {
      *out = &MODEL.variants[i];
      return 0;
    }
  }
  return cnnc_rt_problem(EXIT_INVALID, "the inputs are of none of the batch sizes %s (a picture is a batch of one)",
                         sizes);
}

/* --- results ------------------------------------------------------------------------------------------------------ */

static bool printable(int32_t dtype) { return dtype != 3 && dtype != 4 && dtype <= 9; }

static double element(const cnnc_rt_tensor *tensor, const void *data, uint64_t index) {
  switch (tensor->dtype) {
    case 1:
      return ((const float *)data)[index];
    case 2:
      return ((const double *)data)[index];
    case 5:
      return ((const int8_t *)data)[index];
    case 6:
    case 9:
      return ((const uint8_t *)data)[index];
    case 7:
      return ((const int32_t *)data)[index];
    case 8:
      return (double)((const int64_t *)data)[index];
    default:
      return NAN;
  }
}

/* Points to line `index` of the labels and gives its length; an empty one if there are fewer. */
static const char *label(const cnnc_rt_blob *labels, uint64_t index, int *length) {
  const char *at = (const char *)labels->data;
  const char *end = at + labels->size;
  *length = 0;
  for (; index > 0 && at < end; index--) {
    const char *line_end = memchr(at, '\n', (size_t)(end - at));
    at = line_end == NULL ? end : line_end + 1;
  }
  while (at + *length < end && at[*length] != '\n' && at[*length] != '\r' && *length < 200) {
    ++*length;
  }
  return at;
}

/* Prints the `top` greatest entries of a row; not a number counts as smallest. */
static void print_row(const cnnc_rt_tensor *tensor, const void *data, uint64_t start, uint64_t count, int top,
                      const cnnc_rt_blob *labels) {
  static uint64_t best[MAX_TOP + 1];
  int found = 0;
  for (uint64_t i = 0; i < count; i++) {
    double value = element(tensor, data, start + i);
    int at = found;
    while (at > 0 && !(value <= element(tensor, data, start + best[at - 1])) && !isnan(value)) {
      best[at] = best[at - 1];
      at--;
    }
    if (at < top) {
      best[at] = i;
      found += found < top;
    }
  }
  for (int k = 0; k < found; k++) {
    printf("%" PRIu64 "\t%.6g", best[k], element(tensor, data, start + best[k]));
    if (labels->data != NULL) {
      int length;
      const char *text = label(labels, best[k], &length);
      putchar('\t');
      for (int i = 0; i < length; i++) {
        putchar((unsigned char)text[i] < 32 ? '?' : text[i]);
      }
    }
    putchar('\n');
  }
}

static int print_top(const options *o, const cnnc_rt_tensor *tensor, const void *data) {
  cnnc_rt_blob labels = {NULL, 0};
  if (!printable(tensor->dtype)) {
    return cnnc_rt_problem(EXIT_UNSUPPORTED, "cannot print outputs of this type; write them with -o");
  }
  if (o->labels != NULL) {
    int code = read_file(o->labels, &labels);
    if (code != 0) {
      free(labels.data);
      return code;
    }
  }
  uint64_t total = 1;
  for (int32_t i = 0; i < tensor->rank; i++) {
    total *= (uint64_t)tensor->dims[i];
  }
  /* The first dimension is the batch. */
  uint64_t rows = tensor->rank > 1 ? (uint64_t)tensor->dims[0] : 1;
  for (uint64_t row = 0; row < rows && total > 0; row++) {
    if (rows > 1) {
      printf("%s%" PRIu64 ":\n", row ? "\n" : "", row);
    }
    print_row(tensor, data, row * (total / rows), total / rows, o->top, &labels);
  }
  free(labels.data);
  return 0;
}

static int by_size(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a;
  int64_t y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

static int bench(cnnc_rt_context *context, int runs, int batch, const void *const *inputs, void *const *outputs) {
  int64_t *times = malloc((size_t)runs * sizeof *times);
  if (times == NULL) {
    return CNNC_RT_ERROR_MEMORY;
  }
  int code = cnnc_rt_run_batch(context, batch, inputs, outputs);
  for (int i = 0; i < runs && code == 0; i++) {
    int64_t start = cnnc_rt_clock();
    code = cnnc_rt_run_batch(context, batch, inputs, outputs);
    times[i] = cnnc_rt_clock() - start;
  }
  if (code == 0) {
    qsort(times, (size_t)runs, sizeof *times, by_size);
    printf("%d runs, %d threads: min %.3f ms, median %.3f ms, max %.3f ms\n", runs, cnnc_rt_threads(context),
           (double)times[0] / 1e6, (double)times[runs / 2] / 1e6, (double)times[runs - 1] / 1e6);
  }
  free(times);
  return code;
}

/* --- all together ------------------------------------------------------------------------------------------------- */

static int run_model(const options *o, int batch, const void *const *inputs, void *const *outputs) {
  cnnc_rt_context *context;
  int code = cnnc_rt_create(o->threads, &context);
  if (code == 0) {
    code = o->bench ? bench(context, o->bench, batch, inputs, outputs)
                    : cnnc_rt_run_batch(context, batch, inputs, outputs);
    cnnc_rt_destroy(context);
  }
  return code == 0 ? 0 : cnnc_rt_problem(code / 100, "%s", cnnc_rt_error_text(code));
}

static int finish(const options *o, const cnnc_rt_variant *variant, void *const *outputs) {
  int code = 0;
  for (int i = 0; i < o->output_count && code == 0; i++) {
    code = cnnc_rt_npy_write(o->outputs[i], &variant->outputs[i], outputs[i]);
  }
  if (code == 0 && o->output_count == 0 && o->bench == 0 && MODEL.output_count > 0) {
    code = print_top(o, &variant->outputs[0], outputs[0]);
  }
  if (fflush(stdout) != 0 && code == 0) {
    code = cnnc_rt_problem(EXIT_ENVIRONMENT, "cannot write to the standard output: %s", strerror(errno));
  }
  return code;
}

static void *buffer(uint64_t bytes) {
  void *memory = aligned_alloc(CNNC_RT_ALIGNMENT, (size_t)(bytes / CNNC_RT_ALIGNMENT + 1) * CNNC_RT_ALIGNMENT);
  if (memory != NULL) {
    memset(memory, 0, (size_t)bytes);
  }
  return memory;
}

static int make_buffers(const cnnc_rt_variant *variant, void **inputs, void **outputs) {
  for (int i = 0; i < MODEL.input_count + MODEL.output_count; i++) {
    bool input = i < MODEL.input_count;
    int port = input ? i : i - MODEL.input_count;
    void *memory = buffer(input ? variant->inputs[port].bytes : variant->outputs[port].bytes);
    (input ? inputs : outputs)[port] = memory;
    if (memory == NULL) {
      return cnnc_rt_problem(EXIT_ENVIRONMENT, "not enough memory");
    }
  }
  return 0;
}

static int run_all(const options *o) {
  static cnnc_rt_blob files[MAX_PORTS];
  static void *inputs[MAX_PORTS];
  static void *outputs[MAX_PORTS];
  const cnnc_rt_variant *variant = NULL;
  int code = 0;
  for (int i = 0; i < MODEL.input_count && code == 0; i++) {
    code = read_file(o->inputs[i], &files[i]);
  }
  if (code == 0) {
    code = choose_variant(o, files, &variant);
  }
  if (code == 0) {
    code = make_buffers(variant, inputs, outputs);
  }
  for (int i = 0; i < MODEL.input_count && code == 0; i++) {
    code = load_input(o->inputs[i], &files[i], &variant->inputs[i], &o->how, inputs[i]);
    free(files[i].data);
    files[i].data = NULL;
  }
  if (code == 0) {
    code = run_model(o, variant->batch, (const void *const *)inputs, outputs);
  }
  if (code == 0) {
    code = finish(o, variant, outputs);
  }
  for (int i = 0; i < MAX_PORTS; i++) {
    free(files[i].data);
    free(inputs[i]);
    free(outputs[i]);
  }
  return code;
}

int main(int count, char **arguments) {
  static options o;
  o.top = 5;
  o.how = (cnnc_rt_preprocess){0, {0, 0, 0}, {1, 1, 1}};
  if (count > 0 && arguments[0][0] != 0) {
    const char *slash = strrchr(arguments[0], '/');
    program_name = slash != NULL ? slash + 1 : arguments[0];
  }
  if (count == 2 && (strcmp(arguments[1], "--help") == 0 || strcmp(arguments[1], "-h") == 0)) {
    return usage(stdout);
  }
  if (count == 2 && strcmp(arguments[1], "--info") == 0) {
    return puts(MODEL.meta) < 0 || fflush(stdout) != 0 ? EXIT_ENVIRONMENT : 0;
  }
  if (count < 2 && MODEL.input_count > 0) {
    return usage(stderr);
  }
  if (MODEL.input_count > MAX_PORTS || MODEL.output_count > MAX_PORTS) {
    return cnnc_rt_problem(EXIT_LIMIT, "more than %d inputs or outputs: use the library instead", MAX_PORTS);
  }
  read_meta(&o.how);
  int code = read_options(count, arguments, &o);
  return code == 0 ? run_all(&o) : code;
}
