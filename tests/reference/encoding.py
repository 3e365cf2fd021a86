"""Messages as strings of bits, written and read again in NumPy.

Each function is given what a client has: the arrays of its update, and of what is decoded of it,
which tell the codes; and what derives from keys that client and server both know. It returns the
`Writer` that holds the bits, all of which have been read, and what is decoded of these alone.
"""

import math

import numpy as np

__all__ = [
    "Writer",
    "arrays_of",
    "elias",
    "hadamard",
    "half",
    "largest",
    "levels",
    "low_rank",
    "masked",
    "means",
    "projected",
    "qsgd",
    "scalar",
    "signed",
    "signs",
    "ternary",
    "uniform",
]


class Writer:
    """A string of bits, and from where to read on."""

    def __init__(self):
        self.bits, self.place = "", 0

    def integer(self, value, width):
        assert 0 <= value < 2**width
        self.bits += format(int(value), f"0{width}b") if width else ""

    def read_integer(self, width):
        self.place += width
        return int(self.bits[self.place - width : self.place] or "0", 2)

    def floats(self, values):
        for word in np.atleast_1d(np.asarray(values, np.float32)).ravel().view(np.uint32):
            self.integer(word, 32)

    def read_floats(self, number):
        words = [self.read_integer(32) for _ in range(number)]
        return np.array(words, np.uint32).view(np.float32)

    def omega(self, number):
        """Elias's omega code."""
        code = "0"
        while number > 1:
            digits = format(int(number), "b")
            code, number = digits + code, len(digits) - 1
        self.bits += code

    def read_omega(self):
        number = 1
        while self.bits[self.place] == "1":
            number = self.read_integer(number + 1)
        self.place += 1
        return number


def arrays_of(vector, shapes):
    """The arrays that a vector consists of."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    return [x.reshape(s) for x, s in zip(np.split(vector, ends[:-1]), shapes, strict=True)]


def _vector(arrays):
    return np.concatenate([np.ravel(x) for x in arrays])


def hadamard(x):
    """Sylvester's matrix times a vector, orthonormal."""
    if x.size == 1:
        return x
    a, b = np.split(x, 2)
    return np.concatenate([hadamard(a + b), hadamard(a - b)]) / np.sqrt(2)


def half(update, sent, dtype):
    """16 bits for each entry."""
    out = Writer()
    for x in sent:
        for word in np.ravel(x).astype(dtype).view(np.uint16):
            out.integer(word, 16)
    read = [
        np.array([out.read_integer(16) for _ in range(x.size)], np.uint16).view(dtype)
        for x in update
    ]
    return out, [
        np.asarray(y, np.float32).reshape(x.shape) for x, y in zip(update, read, strict=True)
    ]


def uniform(update, sent, number):
    """The extremes of each array, and the index of each entry's level."""
    out, width = Writer(), math.ceil(math.log2(number))
    for x, y in zip(update, sent, strict=True):
        if x.size:
            out.floats([x.min(), x.max()])
            step = (float(x.max()) - float(x.min())) / (number - 1)
            for index in np.round((np.ravel(y).astype(float) - x.min()) / (step or 1)):
                out.integer(index, width)
    decoded = []
    for x in update:
        if x.size:
            low, high = out.read_floats(2).astype(float)
            index = np.array([out.read_integer(width) for _ in range(x.size)])
            decoded.append((low + index * (high - low) / (number - 1)).reshape(x.shape))
        else:
            decoded.append(x)
    return out, decoded


def scalar(update, sent, bits, symmetric, per_channel):
    """A step, and a zero, of each array or channel; and the level of each entry."""
    out, offset = Writer(), 2 ** (bits - 1) - 1

    def groups(x):
        if not x.size:
            return []
        return x.reshape(-1, x.shape[-1]).T if per_channel and x.ndim > 1 else x.reshape(1, -1)

    for x, y in zip(update, sent, strict=True):
        for group, decoded in zip(groups(x), groups(y), strict=True):
            if symmetric:
                step, zero = np.abs(group).max() / np.float32(offset), offset
            else:
                low, high = min(group.min(), 0), max(group.max(), 0)
                step = (high - low) / np.float32(2**bits - 1)
                zero = np.round(-low / step) if step else 0
            out.floats(step)
            if not symmetric:
                out.integer(zero, bits)
            for level in np.round(decoded / (step or 1)) + zero:
                out.integer(level, bits)
    decoded = []
    for x in update:
        read = []
        for group in groups(x):
            step = out.read_floats(1)[0]
            zero = offset if symmetric else out.read_integer(bits)
            read.append([step * (out.read_integer(bits) - zero) for _ in group])
        read = np.array(read, np.float32)
        decoded.append((read.T if len(read) > 1 else read).reshape(x.shape))
    return out, decoded


def signs(update, sent):
    """A bit for each entry."""
    out = Writer()
    for y in sent:
        for value in np.ravel(y):
            out.integer(value > 0, 1)
    return out, [
        np.array([2.0 * out.read_integer(1) - 1 for _ in range(x.size)]).reshape(x.shape)
        for x in update
    ]


def signed(update, sent):
    """A scale, and a bit for each entry, of all arrays together."""
    out, y = Writer(), _vector(sent)
    out.floats(np.abs(y).max())
    for value in y:
        out.integer(value > 0, 1)
    scale = out.read_floats(1)[0]
    read = np.array([scale * (2 * out.read_integer(1) - 1) for _ in y])
    return out, arrays_of(read, [x.shape for x in update])


def ternary(update, sent):
    """The largest magnitude of each array, and a number of base-3 digits."""
    out = Writer()
    for y in sent:
        if y.size:
            out.floats(np.abs(y).max())
            digits = "".join(str(int(d) + 1) for d in np.sign(np.ravel(y)))
            out.integer(int(digits, 3), math.ceil(y.size * math.log2(3)))
    decoded = []
    for x in update:
        read = []
        if x.size:
            largest, number = out.read_floats(1)[0], None
            number = out.read_integer(math.ceil(x.size * math.log2(3)))
            for _ in range(x.size):
                number, digit = divmod(number, 3)
                read.append(largest * (digit - 1))
        decoded.append(np.array(read[::-1], np.float32).reshape(x.shape))
    return out, decoded


def _norms_and_levels(update, sent, number, size):
    x, y = _vector(update), _vector(sent)
    size = min(size or x.size, x.size)
    for start in range(0, x.size, size):
        bucket = slice(start, start + size)
        norm = np.sqrt(np.square(x[bucket].astype(float)).sum())
        yield norm, np.round(y[bucket] / ((norm or 1) / number)).astype(int)


def qsgd(update, sent, number, size=None):
    """The norm of each bucket, and sign and level of each entry."""
    out, width = Writer(), math.ceil(math.log2(number + 1))
    lengths = []
    for norm, codes in _norms_and_levels(update, sent, number, size):
        out.floats(norm)
        lengths.append(len(codes))
        for code in codes:
            out.integer(code < 0, 1)
            out.integer(abs(code), width)
    read = []
    for length in lengths:
        norm = out.read_floats(1)[0]
        for _ in range(length):
            sign = 1 - 2 * out.read_integer(1)
            read.append(sign * out.read_integer(width) * norm / number)
    return out, arrays_of(np.array(read), [x.shape for x in update])


def elias(update, sent, number, size=None):
    """The norm of each bucket, and of what is not 0 the distance, sign and level."""
    out, lengths = Writer(), []
    for norm, codes in _norms_and_levels(update, sent, number, size):
        out.floats(norm)
        lengths.append(len(codes))
        last = 0
        for place, code in enumerate(codes, 1):
            if code:
                out.omega(place - last)
                out.integer(code < 0, 1)
                out.omega(abs(code))
                last = place
        out.omega(len(codes) + 1 - last)
    read = []
    for length in lengths:
        bucket, place, norm = np.zeros(length), 0, out.read_floats(1)[0]
        while (place := place + out.read_omega()) <= length:
            sign = 1 - 2 * out.read_integer(1)
            bucket[place - 1] = sign * out.read_omega() * norm / number
        read.extend(bucket)
    return out, arrays_of(np.array(read), [x.shape for x in update])


def largest(update, sent, number):
    """The number of the choice among all choices of so many entries, and these."""
    out, y = Writer(), _vector(sent)
    places = np.flatnonzero(y)
    assert len(places) == number
    choices = math.comb(y.size, number)
    rank = sum(math.comb(place, i) for i, place in enumerate(places.tolist(), 1))
    out.integer(rank, (choices - 1).bit_length())
    out.floats(y[places])
    rank, found = out.read_integer((choices - 1).bit_length()), []
    place = y.size
    for i in range(number, 0, -1):
        while math.comb(place, i) > rank:
            place -= 1
        rank -= math.comb(place, i)
        found.append(place)
    read = np.zeros(y.size)
    read[found[::-1]] = out.read_floats(number)
    return out, arrays_of(read, [x.shape for x in update])


def masked(update, sent, mask):
    """The entries of a mask that both sides know."""
    out, y, mask = Writer(), _vector(sent), _vector(mask) != 0
    out.floats(y[mask])
    read = np.zeros(y.size)
    read[mask] = out.read_floats(mask.sum())
    return out, arrays_of(read, [x.shape for x in update])


def levels(update, sent, signs, centroids):
    """A scale, and a centroid's index for each entry of the vector in other coordinates."""
    out, y = Writer(), _vector(sent)
    x = np.append(_vector(update), np.zeros(signs.size - y.size))
    turned = hadamard(signs * x)
    both = np.append(-centroids[::-1], centroids)
    places = turned * np.sqrt(x.size) / np.linalg.norm(x)
    index = np.abs(places[:, None] - both).argmin(1)
    direction = signs * hadamard(both[index])
    # The scale with which the client's own decoded update is reached, whichever that is.
    out.floats(direction[: y.size] @ y / np.square(direction[: y.size]).sum())
    width = int(math.log2(len(both)))
    for i in index:
        out.integer(i, width)
    scale = out.read_floats(1)[0]
    read = both[[out.read_integer(width) for _ in index]]
    return out, arrays_of((signs * hadamard(scale * read))[: y.size], [x.shape for x in update])


def means(update, sent, number, size):
    """The means of clusters, and a cluster's index for each block."""
    out, y = Writer(), _vector(sent)
    blocks = y.reshape(-1, size)
    book, index = np.unique(blocks, axis=0, return_inverse=True)
    number = min(number, len(blocks))
    book = np.append(book, np.zeros((number - len(book), size)), axis=0)
    width = math.ceil(math.log2(number))
    out.floats(book)
    for i in index:
        out.integer(i, width)
    book = out.read_floats(number * size).reshape(number, size)
    read = np.concatenate([book[out.read_integer(width)] for _ in blocks])
    return out, arrays_of(read, [x.shape for x in update])


def low_rank(update, sent, rank):
    """Two factors of each matrix that has more entries than they; the rest whole."""
    out, decoded = Writer(), []
    for x, y in zip(update, sent, strict=True):
        if x.ndim < 2 or not x.size or rank * (x.size // x.shape[-1] + x.shape[-1]) >= x.size:
            out.floats(y)
            decoded.append(out.read_floats(x.size).reshape(x.shape))
            continue
        u, s, v = np.linalg.svd(y.reshape(-1, x.shape[-1]), full_matrices=False)
        assert (s[rank:] < 1e-5 * s[0]).all()
        left, right = u[:, :rank] * s[:rank], v[:rank]
        out.floats(left)
        out.floats(right)
        left = out.read_floats(left.size).reshape(left.shape)
        decoded.append((left @ out.read_floats(right.size).reshape(right.shape)).reshape(x.shape))
    return out, decoded


def projected(update, sent, bases):
    """The coordinates in a basis of the rows that both sides know; what has none, whole."""
    out, decoded = Writer(), []
    for x, y, basis in zip(update, sent, bases, strict=True):
        if basis is None:
            out.floats(y)
            decoded.append(out.read_floats(x.size).reshape(x.shape))
            continue
        coordinates = y.reshape(-1, x.shape[-1]) @ basis
        out.floats(coordinates)
        read = out.read_floats(coordinates.size).reshape(coordinates.shape)
        decoded.append((read @ basis.T).reshape(x.shape))
    return out, decoded
