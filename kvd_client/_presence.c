/* may_hold of kvd/wire/presence.py, for 200 keys in a few microseconds. There stands what the table is. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the table is little-endian; without this module the client reads it in Python"
#endif

enum { ID_BYTES = 32, ID_WORDS = 4, HEADER_WORDS = 512, FLAGS_WORD = 4, ASK_ALWAYS = 1, BUCKET_WORDS = 8, TAGS = 7 };

static const uint64_t MULTIPLIER[ID_WORDS] = {
    0x9E3779B97F4A7C15u,
    0xC2B2AE3D27D4EB4Fu,
    0x165667B19E3779F9u,
    0xD6E8FEB86659FD93u,
};

/* The daemon writes while this reads: every word is loaded once, as a whole. */
static inline uint64_t load(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static int may_be_in(const uint64_t *words, uint64_t buckets, const uint64_t *space, const char *key_bytes)
{
    uint64_t key[ID_WORDS], product[2 * ID_WORDS] = {0};
    memcpy(key, key_bytes, ID_BYTES);
    for (int i = 0; i < ID_WORDS; i++) {
        uint64_t carry = 0;
        for (int j = 0; j < ID_WORDS; j++) {
            unsigned __int128 sum = (unsigned __int128)(key[i] ^ space[i]) * MULTIPLIER[j] + product[i + j] + carry;
            product[i + j] = (uint64_t)sum;
            carry = (uint64_t)(sum >> 64);
        }
        product[i + ID_WORDS] = carry;
    }
    uint64_t tag = product[3] ? product[3] : 1;
    const uint64_t *bucket = words + HEADER_WORDS + (product[4] & (buckets - 1)) * BUCKET_WORDS;
    for (int i = 0; i < TAGS; i++)
        if (load(bucket + i) == tag)
            return 1;
    return load(bucket + TAGS) != 0;
}

/* How many of the keys, from the first on, may be there; -1 with an exception. */
static Py_ssize_t count(const Py_buffer *table, const char *namespace_id, PyObject *keys)
{
    const uint64_t *words = table->buf;
    Py_ssize_t beyond = table->len - HEADER_WORDS * 8, buckets = beyond / (BUCKET_WORDS * 8);
    if (buckets < 1 || beyond % (BUCKET_WORDS * 8) || (buckets & (buckets - 1)) || (uintptr_t)words % 8) {
        PyErr_Format(PyExc_ValueError, "%zd bytes are no presence table", table->len);
        return -1;
    }
    uint64_t space[ID_WORDS];
    memcpy(space, namespace_id, ID_BYTES);
    Py_ssize_t number = 0, total = PySequence_Fast_GET_SIZE(keys);
    int ask_always = (load(words + FLAGS_WORD) & ASK_ALWAYS) != 0;
    for (; number < total; number++) {
        PyObject *key = PySequence_Fast_GET_ITEM(keys, number);
        if (!PyBytes_Check(key)) {
            PyErr_SetString(PyExc_TypeError, "a key is bytes");
            return -1;
        }
        if (ask_always || PyBytes_GET_SIZE(key) != ID_BYTES)
            continue;
        if (!may_be_in(words, (uint64_t)buckets, space, PyBytes_AS_STRING(key)))
            break;
    }
    return number;
}

static PyObject *may_hold(PyObject *module, PyObject *args)
{
    Py_buffer table;
    const char *namespace_id;
    Py_ssize_t id_bytes, number = -1;
    PyObject *sequence;
    if (!PyArg_ParseTuple(args, "y*y#O:may_hold", &table, &namespace_id, &id_bytes, &sequence))
        return NULL;
    PyObject *keys = PySequence_Fast(sequence, "keys are a sequence of bytes");
    if (keys != NULL) {
        if (id_bytes == ID_BYTES)
            number = count(&table, namespace_id, keys);
        else
            PyErr_Format(PyExc_ValueError, "a namespace id of %zd bytes", id_bytes);
        Py_DECREF(keys);
    }
    PyBuffer_Release(&table);
    return number < 0 ? NULL : PyLong_FromSsize_t(number);
}

static PyMethodDef methods[] = {
    {"may_hold", may_hold, METH_VARARGS, "may_hold(words, namespace_id, keys): see kvd.wire.presence."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_presence", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__presence(void)
{
    return PyModuleDef_Init(&module);
}
