/* The host path of a request and of a step, in one call each.

   Optional: what these functions do, Python does as well (mmqwen/vllm_plugin/processing.py,
   mmqwen/packs.py, plan.py), and there it is explained. A function that meets anything out of the
   ordinary (another type, dtype or stride, a value that is not finite, markers that do not match,
   a slice without its pack) returns None, "not mine": Python then gives the answer, or says what is
   wrong. So nothing is refused here, and no answer may differ from Python's by a bit
   (tests/test_native.py).

   Limited API of 3.11, no libtorch: tensors are read through DLPack's exchange table, arrays through
   the buffer protocol. The GIL is held, except while many bytes are copied. Tensors that another
   thread resizes while they are read are read wrongly, as by torch itself. */

#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#ifdef Py_GIL_DISABLED
#error "not safe without the GIL"
#endif

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define PREFETCH(address) ((void)(address))
#endif
#if defined(__GNUC__) && defined(__x86_64__) && defined(__GLIBC__) && !defined(NO_CLONES)
#define CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CLONES
#endif
#if defined(_MSC_VER)
#define RESTRICT __restrict
#else
#define RESTRICT restrict
#endif

/* DLPack 1.x, the parts used (dmlc/dlpack, include/dlpack/dlpack.h). */
typedef struct { uint32_t major, minor; } DLPackVersion;
typedef struct { int32_t type, id; } DLDevice;
typedef struct { uint8_t code, bits; uint16_t lanes; } DLDataType;
typedef struct {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;
typedef struct {
    DLPackVersion version;
    void *prev;
    void *allocate, *from_object, *to_object;
    int (*read)(void *, DLTensor *);
    void *stream;
} ExchangeTable;
enum { DL_CPU = 1, DL_INT = 0, DL_FLOAT = 2, DL_BFLOAT = 4, DL_BOOL = 6 };

/* Packs: the layout of mmqwen/packs.py. */
#define MAGIC 0x6D6D7177656E3032LL
enum { MODALITY_BITS = 8, VERSION_BYTES = 32 };
enum { HEADER_WORDS = 4, GROUP_WORDS = 4, WIDTH_AT = 32, MODALITY_AT = 52, DTYPE_AT = 60 };
#define BEGIN_MASK 0xFFFFFFFFLL
#define WIDTH_MASK 0xFFFFFLL
#define MODALITY_MASK 0xFFLL

enum { F32, F16, BF16, BANK_CODE }; /* as packs number them */
static const int64_t SIZE_OF[] = {4, 2, 2};

enum { MOST_MODALITIES = 64, MOST_BANKS = 64 };
typedef struct { int64_t address, rows, row_bytes, modality, place, first, end; } Bank;
#define KEEPS_GIL (256 * 1024) /* below this many bytes, handing the GIL over costs more */

/* Set once, by `setup`; the main interpreter is the only one (`check_interpreter`). */
static const ExchangeTable *exchange;
static PyObject *tensor_type, *array_type, *allocate, *is_neg, *storage_of, *size_of, *offset_of;

static PyObject *
not_mine(void)
{
    PyErr_Clear();
    Py_RETURN_NONE;
}

/* -- rows of one dtype to another ---------------------------------------------------------------- */

CLONES static uint32_t
f32_to_bf16(const uint32_t *RESTRICT in, uint16_t *RESTRICT out, int64_t n)
{
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = in[i], size = bits & 0x7fffffffu;
        most = size > most ? size : most;
        out[i] = (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16); /* to nearest, even */
    }
    return most >= 0x7f7f8000u; /* from here on, bf16 is infinite */
}

CLONES static uint32_t
copy32(const uint32_t *RESTRICT in, uint32_t *RESTRICT out, int64_t n)
{
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = in[i], size = bits & 0x7fffffffu;
        most = size > most ? size : most;
        out[i] = bits;
    }
    return most >= 0x7f800000u;
}

CLONES static uint32_t
copy16(const uint16_t *RESTRICT in, uint16_t *RESTRICT out, int64_t n, uint16_t infinity)
{
    uint16_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        uint16_t bits = in[i], size = bits & 0x7fff;
        most = size > most ? size : most;
        out[i] = bits;
    }
    return most >= infinity;
}

static int
converts(int from, int to)
{
    return from == to || (from == F32 && to == BF16);
}

/* n elements; whether one is not finite in the result. */
static uint32_t
convert(const void *in, int from, void *out, int to, int64_t n)
{
    if (from == F32)
        return to == BF16 ? f32_to_bf16(in, out, n) : copy32(in, out, n);
    return copy16(in, out, n, to == BF16 ? 0x7f80 : 0x7c00);
}

/* -- items ----------------------------------------------------------------------------------------- */

/* What an array of one dimension holds: `format` is 'q' for int64, '?' for bool (of a tensor, too),
   'B' for uint8. */
static int
get_array(PyObject *o, Py_buffer *b, char format, int writable)
{
    if (format == '?' && (PyObject *)Py_TYPE(o) == tensor_type) {
        DLTensor t;
        if (exchange->read(o, &t) != 0 || t.device.type != DL_CPU || t.ndim != 1 ||
            t.strides[0] != 1 || t.dtype.code != DL_BOOL || t.dtype.lanes != 1)
            return -1;
        memset(b, 0, sizeof *b); /* of no owner: its caller holds the tensor */
        b->buf = (char *)t.data + t.byte_offset;
        b->len = t.shape[0];
        return 0;
    }
    if (PyObject_GetBuffer(o, b, PyBUF_ND | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) != 0)
        return -1;
    char got = b->format == NULL || b->format[0] == 0 || b->format[1] != 0 ? 0 : b->format[0];
    if (got == 'l' && b->itemsize == 8)
        got = 'q'; /* int64 has two names where long is as long */
    if (got == format && b->ndim == 1 && (uintptr_t)b->buf % (size_t)b->itemsize == 0)
        return 0;
    PyBuffer_Release(b);
    return -1;
}

typedef struct {
    PyObject *owner;
    const char *data;
    int64_t rows, step; /* step: bytes from row to row */
    int64_t bank;       /* its number, and `data` are ids, int64; -1: rows that were sent */
    const char *version; /* of the bank */
} Item;

typedef struct {
    int64_t index, token, width, max_rows, rows, sent;
    int code; /* -1 as long as there are no items */
    Item *items;
    Py_ssize_t count;
    Py_ssize_t markers, next; /* in the prompt; the next item to pack */
} Modality;

/* Rows of a pack that lie together: of a modality, or of a bank of it. */
typedef struct {
    Modality *of;
    int64_t bank, total, first_word, written;
    const char *version;
} Group;

static int
code_of(DLDataType type)
{
    if (type.lanes != 1)
        return -1;
    if (type.code == DL_FLOAT)
        return type.bits == 32 ? F32 : type.bits == 16 ? F16 : -1;
    return type.code == DL_BFLOAT && type.bits == 16 ? BF16 : -1;
}

/* What an object holds, if it is a tensor or an array of one or two dimensions; its dtype, or -1. */
static int
read_item(PyObject *o, Item *item, const Modality *m)
{
    int64_t shape[2], strides[2]; /* in bytes */
    int ndim, code;
    if ((PyObject *)Py_TYPE(o) == tensor_type) {
        DLTensor t;
        PyObject *negative = PyObject_CallFunctionObjArgs(is_neg, o, NULL);
        if (negative == NULL)
            return -1;
        Py_DECREF(negative);
        if (negative != Py_False || exchange->read(o, &t) != 0)
            return -1;
        ndim = t.ndim;
        code = code_of(t.dtype);
        if (t.device.type != DL_CPU || code < 0 || ndim < 1 || ndim > 2)
            return -1;
        for (int k = 0; k < ndim; k++) {
            shape[k] = t.shape[k];
            strides[k] = t.strides[k] * SIZE_OF[code];
        }
        item->data = t.data == NULL ? NULL : (const char *)t.data + t.byte_offset;
    }
    else if ((PyObject *)Py_TYPE(o) == array_type) {
        Py_buffer b;
        if (PyObject_GetBuffer(o, &b, PyBUF_STRIDES | PyBUF_FORMAT) != 0)
            return -1;
        ndim = b.ndim;
        code = b.format == NULL || b.format[0] == 0 || b.format[1] != 0 ? -1
               : b.format[0] == 'f' ? F32 : b.format[0] == 'e' ? F16 : -1;
        for (int k = 0; k < ndim && k < 2; k++) {
            shape[k] = b.shape[k];
            strides[k] = b.strides[k];
        }
        item->data = b.buf;
        PyBuffer_Release(&b); /* the array lives on, and so does its memory */
        if (code < 0 || ndim < 1 || ndim > 2)
            return -1;
    }
    else
        return -1;
    int64_t size = SIZE_OF[code];
    item->rows = ndim == 2 ? shape[0] : 1;
    item->step = ndim == 2 ? strides[0] : 0;
    if (shape[ndim - 1] != m->width || item->rows < 1 || item->rows > m->max_rows ||
        item->rows > INT32_MAX)
        return -1;
    if (item->data == NULL || (uintptr_t)item->data % size != 0)
        return -1;
    if (m->width > 1 && strides[ndim - 1] != size)
        return -1;
    if (item->rows == 1)
        item->step = m->width * size;
    return item->step % size == 0 ? code : -1;
}

/* An item that names rows: (bank number, ids, version), of which Python has checked the ids. */
static int
read_named(PyObject *o, Item *item, const Modality *m)
{
    Py_buffer b;
    if (!PyTuple_CheckExact(o) || PyTuple_Size(o) != 3)
        return -1;
    PyObject *version = PyTuple_GetItem(o, 2);
    item->bank = PyLong_AsLongLong(PyTuple_GetItem(o, 0));
    if (item->bank < 0 || item->bank >= WIDTH_MASK || !PyBytes_CheckExact(version) ||
        PyBytes_Size(version) != VERSION_BYTES || get_array(PyTuple_GetItem(o, 1), &b, 'q', 0) != 0)
        return -1;
    item->data = b.buf; /* the tuple holds the array */
    item->rows = b.len / (Py_ssize_t)sizeof(int64_t);
    item->version = PyBytes_AsString(version);
    PyBuffer_Release(&b);
    if (item->rows < 1 || item->rows > m->max_rows || item->rows > INT32_MAX)
        return -1;
    for (int64_t r = 0; r < item->rows; r++)
        if (((const int64_t *)item->data)[r] & ~BEGIN_MASK)
            return -1;
    return 0;
}

/* The items of one modality: a list, a tuple, or a tensor or array, which is one item. `named` is
   NULL, or a list that has of each what it names, or None. */
static int
read_items(Modality *m, PyObject *value, PyObject *named)
{
    int list = PyList_CheckExact(value), tuple = !list && PyTuple_CheckExact(value);
    Py_ssize_t n = list ? PyList_Size(value) : tuple ? PyTuple_Size(value) : 1;
    if (named != NULL && (!PyList_CheckExact(named) || PyList_Size(named) != n || !(list || tuple)))
        return -1;
    if (n == 0)
        return 0;
    m->items = PyMem_Calloc((size_t)n, sizeof(Item));
    if (m->items == NULL)
        return -1;
    for (; m->count < n; m->count++) {
        PyObject *o = list    ? PyList_GetItem(value, m->count)
                      : tuple ? PyTuple_GetItem(value, m->count)
                              : value;
        PyObject *rows = named == NULL ? NULL : PyList_GetItem(named, m->count);
        m->items[m->count].bank = rows == NULL || rows == Py_None ? -1 : 0;
        if (rows != NULL && rows != Py_None)
            o = rows;
        if (o == NULL)
            return -1;
        Py_INCREF(o);
        m->items[m->count].owner = o;
        PREFETCH(o);
    }
    /* What a tensor's object points to: torch reads some 200 bytes of it, which no cache holds. A
       hint alone: the pointer is never followed, so another layout of the object costs nothing but
       speed. */
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *o = m->items[i].owner;
        const char *inner;
        if ((PyObject *)Py_TYPE(o) != tensor_type)
            continue;
        memcpy(&inner, (const char *)o + sizeof(PyObject), sizeof inner);
        for (int k = 0; k < 256; k += 64)
            PREFETCH(inner + k);
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        Item *item = &m->items[i];
        if (item->bank == 0) {
            if (read_named(item->owner, item, m) != 0)
                return -1;
            m->rows += item->rows;
            continue;
        }
        int code = read_item(item->owner, item, m);
        if (code < 0 || (m->code >= 0 && code != m->code))
            return -1;
        m->code = code;
        m->rows += item->rows;
        m->sent += item->rows;
        PREFETCH(item->data);
    }
    return 0;
}

/* -- the prompt ------------------------------------------------------------------------------------- */

typedef struct {
    Modality *of;
    Item *item;
    int64_t start;
    int cut_before; /* a pack ends between the item before and this one */
    int group;      /* of the pack being made */
} Placed;

typedef struct {
    Modality modalities[MOST_MODALITIES];
    int count;
    int64_t lowest, highest; /* of the placeholders' ids */
    PyObject *ids;           /* the expanded prompt */
    Py_ssize_t length;
    Placed *placed;
    Py_ssize_t items;
    int64_t end; /* of the last item placed */
} Message;

static Modality *
placeholder(Message *msg, int64_t id)
{
    if (id < msg->lowest || id > msg->highest)
        return NULL;
    for (int k = 0; k < msg->count; k++)
        if (msg->modalities[k].token == id)
            return &msg->modalities[k];
    return NULL;
}

static int
put(Message *msg, PyObject *id, int64_t times)
{
    for (int64_t k = 0; k < times; k++) {
        Py_INCREF(id);
        if (PyList_SetItem(msg->ids, msg->length++, id) != 0)
            return -1;
    }
    return 0;
}

static int
place(Message *msg, Modality *m, Py_ssize_t index, PyObject *id, int cut)
{
    Item *item = &m->items[index];
    msg->placed[msg->items++] = (Placed){m, item, msg->length, cut, 0};
    if (put(msg, id, item->rows) != 0)
        return -1;
    msg->end = msg->length;
    return 0;
}

/* Each marker becomes as many placeholders as its item has rows; items of modalities without a
   marker stand before the text. -1: not mine. */
static int
expand(Message *msg, PyObject *tokens, PyObject *turns, int64_t gap, int64_t most)
{
    Py_ssize_t n = PyList_Size(tokens), ends = PyTuple_Size(turns), total = 0;
    int64_t length = n, turn[8];
    if (ends < 0 || ends > 8)
        return -1;
    for (Py_ssize_t k = 0; k < ends; k++)
        turn[k] = PyLong_AsLongLong(PyTuple_GetItem(turns, k));
    int64_t *ids = PyMem_Malloc(sizeof(int64_t) * (size_t)(n + 1));
    if (ids == NULL)
        return -1;
    int done = -1, over;
    for (Py_ssize_t at = 0; at < n; at++) {
        PyObject *token = PyList_GetItem(tokens, at);
        if (token == NULL || !PyLong_CheckExact(token))
            goto end;
        ids[at] = PyLong_AsLongLongAndOverflow(token, &over);
        if (over || ids[at] < 0)
            goto end;
        Modality *m = placeholder(msg, ids[at]);
        if (m != NULL)
            m->markers++;
    }
    for (int k = 0; k < msg->count; k++) {
        Modality *m = &msg->modalities[k];
        if (m->markers != 0 && m->markers != m->count)
            goto end;
        length += m->rows - m->markers;
        total += m->count;
    }
    if (length > most || total == 0)
        goto end;
    msg->placed = PyMem_Malloc(sizeof(Placed) * (size_t)total);
    msg->ids = PyList_New(length);
    if (msg->placed == NULL || msg->ids == NULL)
        goto end;
    for (int k = 0; k < msg->count; k++) {
        Modality *m = &msg->modalities[k];
        if (m->markers != 0 || m->count == 0)
            continue;
        PyObject *id = PyLong_FromLongLong(m->token);
        int wrong = id == NULL;
        for (Py_ssize_t i = 0; i < m->count && !wrong; i++)
            wrong = place(msg, m, i, id, 0) != 0;
        Py_XDECREF(id);
        if (wrong)
            goto end;
    }
    int turned = 0;
    for (Py_ssize_t at = 0; at < n; at++) {
        PyObject *token = PyList_GetItem(tokens, at);
        if (token == NULL)
            goto end;
        Modality *m = placeholder(msg, ids[at]);
        if (m == NULL) {
            for (Py_ssize_t k = 0; k < ends; k++)
                turned |= ids[at] == turn[k];
            if (put(msg, token, 1) != 0)
                goto end;
            continue;
        }
        int cut = msg->items > 0 && (turned || msg->length - msg->end >= gap);
        if (place(msg, m, m->next++, token, cut) != 0)
            goto end;
        turned = 0;
    }
    done = msg->length == length ? 0 : -1;
end:
    PyMem_Free(ids);
    return done;
}

/* -- the pack --------------------------------------------------------------------------------------- */

static int64_t
aligned(int64_t words)
{
    return (words + 1) & ~(int64_t)1;
}

/* Rows of the items `placed[0:n]` into the groups laid out at `base`; nonzero: not all finite. */
static uint32_t
copy_items(const Placed *placed, Py_ssize_t n, Group *groups, char *base, int to)
{
    uint32_t wrong = 0;
    for (Py_ssize_t i = 0; i < n && !wrong; i++) {
        const Modality *m = placed[i].of;
        const Item *item = placed[i].item;
        Group *g = &groups[placed[i].group];
        if (item->bank >= 0)
            continue;
        int64_t row = m->width * SIZE_OF[to];
        char *out = base + 8 * g->first_word + g->written * row;
        if (i + 1 < n)
            for (int k = 0; k < 1024; k += 64)
                PREFETCH(placed[i + 1].item->data + k);
        if (item->step == m->width * SIZE_OF[m->code])
            wrong |= convert(item->data, m->code, out, to, item->rows * m->width);
        else
            for (int64_t r = 0; r < item->rows; r++)
                wrong |= convert(item->data + r * item->step, m->code, out + r * row, to, m->width);
        g->written += item->rows;
    }
    return wrong;
}

/* The pack of `placed[0:n]`, or NULL: not mine. */
static PyObject *
make_pack(Placed *placed, Py_ssize_t n, int to)
{
    Group groups[MOST_MODALITIES]; /* in the order of their first item */
    int64_t total = 0, nbytes = 0, size = SIZE_OF[to];
    int count = 0;
    for (Py_ssize_t i = 0; i < n; i++) {
        const Item *item = placed[i].item;
        int k = 0;
        while (k < count && (groups[k].of != placed[i].of || groups[k].bank != item->bank))
            k++;
        if (k == MOST_MODALITIES)
            return NULL;
        if (k == count)
            groups[count++] = (Group){placed[i].of, item->bank, 0, 0, 0, item->version};
        placed[i].group = k;
        groups[k].total += item->rows;
        total += item->rows;
    }
    int64_t directory = HEADER_WORDS + GROUP_WORDS * (int64_t)count;
    int64_t words = aligned(directory + 2 * total);
    for (int k = 0; k < count; k++) {
        Group *g = &groups[k];
        int64_t held = g->bank < 0 ? g->total * g->of->width * size : VERSION_BYTES;
        g->first_word = words;
        words = aligned(words + (held + 7) / 8);
        nbytes += held;
        if (8 * words > BEGIN_MASK)
            return NULL;
    }
    PyObject *number = PyLong_FromLongLong(words);
    PyObject *pack = number == NULL ? NULL : PyObject_CallFunctionObjArgs(allocate, number, NULL);
    Py_XDECREF(number);
    if (pack == NULL)
        return NULL;
    DLTensor t;
    if ((PyObject *)Py_TYPE(pack) != tensor_type || exchange->read(pack, &t) != 0 ||
        t.device.type != DL_CPU || t.ndim != 1 || t.shape[0] != words || t.dtype.bits != 64 ||
        t.data == NULL) {
        Py_DECREF(pack);
        return NULL;
    }
    int64_t *word = (int64_t *)((char *)t.data + t.byte_offset);
    int64_t *header = word, *entry = word + directory;
    *header++ = MAGIC;
    *header++ = total;
    *header++ = count;
    *header++ = to;
    for (int k = 0; k < count; k++) {
        const Group *g = &groups[k];
        *header++ = g->of->index | (g->bank + 1) << MODALITY_BITS;
        *header++ = g->of->width;
        *header++ = g->total;
        *header++ = g->first_word;
        int64_t end = k + 1 < count ? groups[k + 1].first_word : words;
        int64_t held = g->bank < 0 ? g->total * g->of->width * size : VERSION_BYTES;
        for (int64_t w = g->first_word + held / 8; w < end; w++)
            word[w] = 0; /* gaps are hashed, so they are defined */
        if (g->bank >= 0)
            memcpy(word + g->first_word, g->version, VERSION_BYTES);
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        const Modality *m = placed[i].of;
        Group *g = &groups[placed[i].group];
        if (g->bank >= 0) {
            const int64_t *ids = (const int64_t *)placed[i].item->data;
            int64_t named = g->bank | m->index << (MODALITY_AT - WIDTH_AT) |
                            (int64_t)BANK_CODE << (DTYPE_AT - WIDTH_AT);
            for (int64_t r = 0; r < placed[i].item->rows; r++) {
                *entry = entry - word;
                entry[1] = named << WIDTH_AT | (ids[r] & BEGIN_MASK);
                entry += 2;
            }
            continue;
        }
        int64_t kind = m->width | m->index << (MODALITY_AT - WIDTH_AT) |
                       (int64_t)to << (DTYPE_AT - WIDTH_AT);
        int64_t row = m->width * size, begin = 8 * g->first_word + g->written * row;
        for (int64_t r = 0; r < placed[i].item->rows; r++, begin += row) {
            *entry = entry - word;
            entry[1] = kind << WIDTH_AT | begin;
            entry += 2;
        }
        g->written += placed[i].item->rows;
    }
    for (int k = 0; k < count; k++)
        groups[k].written = 0;
    uint32_t wrong;
    if (nbytes < KEEPS_GIL)
        wrong = copy_items(placed, n, groups, (char *)word, to);
    else {
        PyThreadState *state = PyEval_SaveThread();
        wrong = copy_items(placed, n, groups, (char *)word, to);
        PyEval_RestoreThread(state);
    }
    if (wrong) {
        Py_DECREF(pack);
        return NULL;
    }
    return pack;
}

/* (pack, rows of each item, offset, length, mask or None) of the items `placed[0:n]`. */
static PyObject *
make_span(Placed *placed, Py_ssize_t n, int to)
{
    const Placed *last = &placed[n - 1];
    int64_t offset = placed[0].start, length = last->start + last->item->rows - offset, rows = 0;
    PyObject *pack = make_pack(placed, n, to), *counts = PyList_New(n), *mask = NULL;
    if (pack == NULL || counts == NULL)
        goto wrong;
    for (Py_ssize_t i = 0; i < n; i++) {
        rows += placed[i].item->rows;
        PyObject *number = PyLong_FromLongLong(placed[i].item->rows);
        if (number == NULL || PyList_SetItem(counts, i, number) != 0)
            goto wrong;
    }
    if (rows == length)
        return Py_BuildValue("NNLLO", pack, counts, (long long)offset, (long long)length, Py_None);
    mask = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)length);
    if (mask == NULL)
        goto wrong;
    char *at = PyByteArray_AsString(mask);
    memset(at, 0, (size_t)length);
    for (Py_ssize_t i = 0; i < n; i++)
        memset(at + (placed[i].start - offset), 1, (size_t)placed[i].item->rows);
    return Py_BuildValue("NNLLN", pack, counts, (long long)offset, (long long)length, mask);
wrong:
    Py_XDECREF(pack);
    Py_XDECREF(counts);
    Py_XDECREF(mask);
    return NULL;
}

/* pack_message(token_ids, table, turn_ids, gap, max_tokens, dtype code) ->
   (expanded token ids, [(pack, counts, offset, length, mask)], [(items, rows, bytes)]) or None.
   table: (modality index, placeholder id, width, most rows of an item, items) of every modality, and
   what of these names rows (`read_items`), if any does; those that the prompt brings first, in its order; the others with no items. The last list is one a modality. */
static PyObject *
pack_message(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (exchange == NULL || nargs != 6 || !PyList_CheckExact(args[0]) || !PyList_CheckExact(args[1]))
        return not_mine();
    Py_ssize_t count = PyList_Size(args[1]);
    int64_t gap = PyLong_AsLongLong(args[3]), most = PyLong_AsLongLong(args[4]);
    int to = (int)PyLong_AsLong(args[5]);
    if (PyErr_Occurred() || count < 1 || count > MOST_MODALITIES || to < F32 || to > BF16 ||
        most > INT32_MAX) /* so that no product of sizes overflows */
        return not_mine();
    PyObject *spans = NULL, *tally = NULL, *result = NULL;
    Message *msg = PyMem_Calloc(1, sizeof(Message));
    if (msg == NULL)
        return not_mine();
    msg->lowest = INT64_MAX;
    msg->highest = -1;
    for (int k = 0; k < count; k++) {
        PyObject *items = NULL, *named = NULL;
        long long index, token, width, max_rows;
        if (!PyArg_ParseTuple(PyList_GetItem(args[1], k), "LLLLO|O", &index, &token, &width,
                              &max_rows, &items, &named))
            goto end;
        Modality *m = &msg->modalities[msg->count++];
        m->index = index;
        m->token = token;
        m->width = width;
        m->max_rows = max_rows;
        m->code = -1;
        if (index < 0 || index > MODALITY_MASK || width < 1 || width > WIDTH_MASK || token < 0)
            goto end;
        if (read_items(m, items, named) != 0)
            goto end;
        if (m->code >= 0 && !converts(m->code, to))
            goto end;
        msg->lowest = token < msg->lowest ? token : msg->lowest;
        msg->highest = token > msg->highest ? token : msg->highest;
    }
    if (expand(msg, args[0], args[2], gap, most) != 0)
        goto end;
    spans = PyList_New(0);
    tally = PyList_New(0);
    if (spans == NULL || tally == NULL)
        goto end;
    for (Py_ssize_t first = 0, last = 1; first < msg->items; first = last++) {
        while (last < msg->items && !msg->placed[last].cut_before)
            last++;
        PyObject *span = make_span(&msg->placed[first], last - first, to);
        int wrong = span == NULL || PyList_Append(spans, span) != 0;
        Py_XDECREF(span);
        if (wrong)
            goto end;
    }
    for (int k = 0; k < msg->count; k++) {
        const Modality *m = &msg->modalities[k];
        int64_t nbytes = m->code < 0 ? 0 : m->sent * m->width * SIZE_OF[m->code];
        PyObject *row = Py_BuildValue("nLL", m->count, (long long)m->sent, (long long)nbytes);
        int wrong = row == NULL || PyList_Append(tally, row) != 0;
        Py_XDECREF(row);
        if (wrong)
            goto end;
    }
    result = PyTuple_Pack(3, msg->ids, spans, tally);
end:
    Py_XDECREF(spans);
    Py_XDECREF(tally);
    Py_XDECREF(msg->ids);
    for (int k = 0; k < msg->count; k++) {
        for (Py_ssize_t i = 0; i < msg->modalities[k].count; i++)
            Py_DECREF(msg->modalities[k].items[i].owner);
        PyMem_Free(msg->modalities[k].items);
    }
    PyMem_Free(msg->placed);
    PyMem_Free(msg);
    return result == NULL ? not_mine() : result;
}

/* -- a step ------------------------------------------------------------------------------------------ */

static int64_t
number_of(PyObject *method, PyObject *object)
{
    PyObject *number = PyObject_CallFunctionObjArgs(method, object, NULL);
    if (number == NULL)
        return -1;
    int64_t value = PyLong_AsLongLong(number);
    Py_DECREF(number);
    return value;
}

/* Bytes from the beginning of a tensor's data to the end of its storage, and to its beginning. */
static int
room_of(PyObject *tensor, int64_t *before, int64_t *behind)
{
    int64_t offset = tensor == NULL ? -1 : number_of(offset_of, tensor);
    PyObject *storage = offset < 0 ? NULL : PyObject_CallFunctionObjArgs(storage_of, tensor, NULL);
    if (storage == NULL)
        return -1;
    int64_t nbytes = number_of(size_of, storage);
    Py_DECREF(storage);
    *before = 8 * offset;
    *behind = nbytes - *before;
    return nbytes < 0 ? -1 : 0;
}

typedef struct {
    const int64_t *entry;
    int64_t rows;
} Slice;

/* find_rows(slices, widths, dtype code, banks) -> bytearray or None: the address of each row, int64,
   then the modality of each, int64; with banks then a byte each, where the row lies: 0 on the host, 1
   on the device, 2 on the device and projected before. `banks` is None or int64 [7 n]: of each bank
   its address (0: not to be found so), rows, bytes of a row, modality, where its rows lie, and the
   first and the end of those that lie at the address, which of others is 0. */
static PyObject *
find_rows(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (exchange == NULL || nargs != 4 || !PyList_CheckExact(args[0]) ||
        !PyTuple_CheckExact(args[1]))
        return not_mine();
    Py_ssize_t parts = PyList_Size(args[0]), modalities = PyTuple_Size(args[1]);
    const int has_banks = args[3] != Py_None;
    Py_buffer table = {0};
    Bank banks[MOST_BANKS];
    int64_t num_banks = 0;
    if (has_banks) {
        if (get_array(args[3], &table, 'q', 0) != 0)
            return not_mine();
        num_banks = table.len / (Py_ssize_t)sizeof(Bank);
        if (num_banks <= MOST_BANKS)
            memcpy(banks, table.buf, sizeof(Bank) * (size_t)num_banks);
        PyBuffer_Release(&table);
        if (num_banks > MOST_BANKS)
            return not_mine();
    }
    int code = (int)PyLong_AsLong(args[2]);
    if (code < F32 || code > BF16 || modalities > MOST_MODALITIES || parts == 0)
        return not_mine();
    int64_t kinds[MOST_MODALITIES], row_bytes[MOST_MODALITIES], total = 0, at = 0;
    for (Py_ssize_t m = 0; m < modalities; m++) {
        int64_t width = PyLong_AsLongLong(PyTuple_GetItem(args[1], m));
        if (width < 1 || width > WIDTH_MASK)
            return not_mine();
        kinds[m] = width | (int64_t)m << (MODALITY_AT - WIDTH_AT) |
                   (int64_t)code << (DTYPE_AT - WIDTH_AT);
        row_bytes[m] = width * SIZE_OF[code];
    }
    Slice *slices = PyMem_Malloc(sizeof(Slice) * (size_t)parts);
    PyObject *found = NULL;
    if (slices == NULL)
        goto wrong;
    for (Py_ssize_t i = 0; i < parts; i++) {
        PyObject *o = PyList_GetItem(args[0], i);
        DLTensor t;
        if (o == NULL || (PyObject *)Py_TYPE(o) != tensor_type || exchange->read(o, &t) != 0 ||
            t.device.type != DL_CPU || t.ndim != 2 || t.shape[1] != 2 || t.dtype.lanes != 1 ||
            t.dtype.code != DL_INT || t.dtype.bits != 64 || t.strides[0] != 2 || t.strides[1] != 1)
            goto wrong;
        slices[i].entry = (const int64_t *)((char *)t.data + t.byte_offset);
        slices[i].rows = t.shape[0];
        total += t.shape[0];
        PREFETCH(slices[i].entry);
    }
    found = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)((has_banks ? 17 : 16) * total));
    if (found == NULL)
        goto wrong;
    int64_t *address = (int64_t *)PyByteArray_AsString(found), *modality = address + total;
    char *place = has_banks ? (char *)(modality + total) : NULL;
    for (Py_ssize_t i = 0; i < parts; i++) {
        const int64_t *entry = slices[i].entry;
        int64_t rows = slices[i].rows, before, behind;
        if (rows == 0)
            continue;
        if ((uintptr_t)entry % sizeof *entry != 0 ||
            room_of(PyList_GetItem(args[0], i), &before, &behind) != 0)
            goto wrong;
        /* Where the pack begins: it must lie in the storage, and say that it is one. */
        int64_t position = entry[0];
        if (position > before / 8 || position < -((behind - 8 * HEADER_WORDS) / 8) ||
            8 * position > before || -8 * position > behind - 8 * HEADER_WORDS)
            goto wrong;
        const char *begin = (const char *)entry - 8 * position, *end = (const char *)entry + behind;
        int64_t magic;
        memcpy(&magic, begin, sizeof magic);
        if (magic != MAGIC)
            goto wrong;
        for (int64_t r = 0; r < rows; r++) {
            uint64_t bits = (uint64_t)entry[2 * r + 1];
            int64_t kind = (int64_t)(bits >> WIDTH_AT);
            int64_t m = (kind >> (MODALITY_AT - WIDTH_AT)) & MODALITY_MASK;
            int64_t row_at = (int64_t)(bits & BEGIN_MASK);
            if (bits >> DTYPE_AT == BANK_CODE) {
                int64_t number = kind & WIDTH_MASK;
                if (number >= num_banks || m >= modalities)
                    goto wrong;
                const Bank *bank = &banks[number];
                if (bank->address == 0 || bank->modality != m || row_at >= bank->rows)
                    goto wrong;
                address[at] = 0;
                if (row_at >= bank->first && row_at < bank->end)
                    address[at] = bank->address + (row_at - bank->first) * bank->row_bytes;
                place[at] = (char)bank->place;
                modality[at++] = m;
                continue;
            }
            if (place != NULL)
                place[at] = 0;
            if (m >= modalities || kind != kinds[m] || end - begin - row_at < row_bytes[m])
                goto wrong;
            address[at] = (int64_t)(intptr_t)(begin + row_at);
            modality[at++] = m;
        }
    }
    PyMem_Free(slices);
    return found;
wrong:
    PyMem_Free(slices);
    Py_XDECREF(found);
    return not_mine();
}

enum { ADDRESS, MODALITY, MASK, OUT, BUFFERS };
static const char FORMATS[BUFFERS] = {'q', 'q', '?', 'B'};

/* count_rows(address int64 [R], modality int64 [R], mask bool [T], T, number of modalities) ->
   (rows of each, ...) or None: other arrays, an unknown modality, or not as many slots. */
static PyObject *
count_rows(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer b[BUFFERS];
    int held = 0;
    PyObject *found = NULL;
    if (exchange == NULL || nargs != 5)
        return not_mine();
    for (; held < OUT; held++)
        if (get_array(args[held], &b[held], FORMATS[held], 0) != 0)
            goto end;
    int64_t tokens = PyLong_AsLongLong(args[3]), modalities = PyLong_AsLongLong(args[4]);
    int64_t counts[MOST_MODALITIES] = {0}, rows = b[MODALITY].len / 8, slots = 0;
    if (modalities < 0 || modalities > MOST_MODALITIES || b[MASK].len != tokens ||
        b[ADDRESS].len != b[MODALITY].len)
        goto end;
    for (int64_t r = 0; r < rows; r++) {
        int64_t m = ((const int64_t *)b[MODALITY].buf)[r];
        if (m < 0 || m >= modalities)
            goto end;
        counts[m]++;
    }
    for (int64_t t = 0; t < tokens; t++)
        slots += ((const uint8_t *)b[MASK].buf)[t] != 0;
    if (slots != rows)
        goto end;
    found = PyTuple_New((Py_ssize_t)modalities);
    for (Py_ssize_t m = 0; m < modalities && found != NULL; m++)
        PyTuple_SetItem(found, m, PyLong_FromLongLong(counts[m]));
end:
    while (held-- > 0)
        PyBuffer_Release(&b[held]);
    return found == NULL ? not_mine() : found;
}

typedef struct {
    const int64_t *address, *modality;
    const uint8_t *mask;
    int64_t rows, tokens;
    int64_t *order;
    char *target[MOST_MODALITIES];
    int64_t slot[MOST_MODALITIES], row_bytes[MOST_MODALITIES];
} Step;

static void
write_step(Step *s)
{
    int64_t text = 0, at = 0;
    for (int64_t r = 0; r < s->rows;) {
        int64_t m = s->modality[r], bytes = s->row_bytes[m], run = 1;
        while (r + run < s->rows && s->modality[r + run] == m &&
               s->address[r + run] == s->address[r] + run * bytes)
            run++;
        memcpy(s->target[m], (const char *)(intptr_t)s->address[r], (size_t)(run * bytes));
        s->target[m] += run * bytes;
        for (r += run; run > 0; run--) {
            while (at < s->tokens && !s->mask[at]) /* bounded: it may be written to meanwhile */
                s->order[text++] = at++;
            if (at < s->tokens)
                s->order[s->slot[m]++] = at++;
        }
    }
    while (at < s->tokens)
        s->order[text++] = at++;
}

/* write_rows(address, modality, mask, out uint8, counts, row bytes, order_at, rows_at) -> True:
   the order of the tokens and the rows, by modality, as `RowPlan` says; counts as `count_rows` gave
   them for the same arrays. */
static PyObject *
write_rows(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    Step s = {0};
    Py_buffer b[BUFFERS];
    int held = 0;
    if (nargs != 8) {
        PyErr_SetString(PyExc_TypeError, "write_rows takes 8 arguments");
        return NULL;
    }
    for (; held < BUFFERS; held++)
        if (get_array(args[held], &b[held], FORMATS[held], held == OUT) != 0)
            goto wrong;
    Py_ssize_t modalities = PyTuple_Size(args[4]);
    if (modalities < 0 || modalities > MOST_MODALITIES || PyTuple_Size(args[5]) != modalities ||
        PyList_Size(args[7]) != modalities)
        goto wrong;
    s.address = b[ADDRESS].buf;
    s.modality = b[MODALITY].buf;
    s.mask = b[MASK].buf;
    s.rows = b[ADDRESS].len / 8;
    s.tokens = b[MASK].len;
    int64_t order_at = PyLong_AsLongLong(args[6]), total = 0, seen = 0, nbytes = 0;
    int64_t counts[MOST_MODALITIES];
    char *out = b[OUT].buf;
    for (Py_ssize_t m = 0; m < modalities; m++) {
        int64_t rows_at = PyLong_AsLongLong(PyList_GetItem(args[7], m));
        counts[m] = PyLong_AsLongLong(PyTuple_GetItem(args[4], m));
        s.row_bytes[m] = PyLong_AsLongLong(PyTuple_GetItem(args[5], m));
        if (PyErr_Occurred() || counts[m] < 0 || s.row_bytes[m] < 0 ||
            (counts[m] > 0 && (rows_at < 0 || rows_at + counts[m] * s.row_bytes[m] > b[OUT].len)))
            goto wrong;
        s.target[m] = out + (rows_at < 0 ? 0 : rows_at);
        s.slot[m] = s.tokens - s.rows + total;
        total += counts[m];
        nbytes += counts[m] * s.row_bytes[m];
    }
    if (b[MODALITY].len != b[ADDRESS].len || total != s.rows || s.rows > s.tokens || order_at < 0 ||
        order_at % 8 != 0 || (uintptr_t)out % 8 != 0 || order_at + 8 * s.tokens > b[OUT].len)
        goto wrong;
    s.order = (int64_t *)(out + order_at);
    for (int64_t r = 0; r < s.rows; r++) {
        int64_t m = s.modality[r];
        if (m < 0 || m >= modalities || --counts[m] < 0)
            goto wrong;
    }
    for (int64_t t = 0; t < s.tokens; t++)
        seen += s.mask[t] != 0;
    if (seen != s.rows)
        goto wrong;
    if (nbytes < KEEPS_GIL)
        write_step(&s);
    else {
        PyThreadState *state = PyEval_SaveThread();
        write_step(&s);
        PyEval_RestoreThread(state);
    }
    while (held-- > 0)
        PyBuffer_Release(&b[held]);
    Py_RETURN_TRUE;
wrong:
    while (held-- > 0)
        PyBuffer_Release(&b[held]);
    if (!PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "rows, slots and buffer do not fit together");
    return NULL;
}

/* -- the module -------------------------------------------------------------------------------------- */

/* setup(torch.Tensor, numpy.ndarray, exchange capsule, allocate, UntypedStorage) -> whether the
   functions can be used with this torch; allocate(n) is an int64 tensor [n]. */
static PyObject *
setup(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 5) {
        PyErr_SetString(PyExc_TypeError, "setup takes 5 arguments");
        return NULL;
    }
    const ExchangeTable *table = PyCapsule_GetPointer(args[2], "dlpack_exchange_api");
    if (table == NULL)
        return NULL;
    if (table->version.major != 1 || table->read == NULL)
        Py_RETURN_FALSE;
    static PyObject **const slots[] = {&is_neg, &storage_of, &offset_of, &size_of};
    static const char *const names[] = {"is_neg", "untyped_storage", "storage_offset", "nbytes"};
    for (int k = 0; k < 4; k++) {
        *slots[k] = PyObject_GetAttrString(args[k < 3 ? 0 : 4], names[k]);
        if (*slots[k] == NULL)
            return NULL;
    }
    tensor_type = Py_NewRef(args[0]);
    array_type = Py_NewRef(args[1]);
    allocate = Py_NewRef(args[3]);
    exchange = table;
    Py_RETURN_TRUE;
}

#ifndef SOURCE
#define SOURCE 0 /* setup.py gives a checksum of this file */
#endif

static int
check_interpreter(PyObject *module)
{
    if (PyInterpreterState_GetID(PyInterpreterState_Get()) == 0)
        return PyModule_AddIntConstant(module, "source", SOURCE);
    PyErr_SetString(PyExc_ImportError, "mmqwen's native helper runs in the main interpreter alone");
    return -1;
}

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}
static PyMethodDef methods[] = {METHOD(setup), METHOD(pack_message), METHOD(find_rows),
                                METHOD(count_rows), METHOD(write_rows), {NULL, NULL, 0, NULL}};
static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)check_interpreter}, {0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", NULL, 0,
                                        methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC
PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
