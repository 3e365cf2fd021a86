"""What the field's benchmarks do to their raw features, as transforms for `read` and `convert`."""

import importlib
import math
import os
import re
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_lite import _validate

__all__ = [
    "BOS",
    "EOS",
    "NUM_SPECIAL",
    "PAD",
    "SHAKESPEARE_VOCABULARY_SIZE",
    "Features",
    "cifar",
    "emnist",
    "emnist_domain",
    "random_crop",
    "read_vocabulary",
    "shakespeare",
    "stackoverflow",
    "stackoverflow_tags",
    "standardize",
]


def __dir__() -> list[str]:
    return __all__


Features = dict[str, np.ndarray]

PAD, BOS, EOS, NUM_SPECIAL = 0, 1, 2, 3
"""Ids of padding, beginning and end of a text; symbols follow from 3, and then the unknown."""

# The 86 characters of TensorFlow Federated's tutorial on text generation, in its order.
_CHARACTERS = (
    b"dhlptx@DHLPTX $(,048cgkoswCGKOSW[_#'/37;?bfjnrvzBFJNRVZ\"&*.26:\naeimquyAEIMQUY]!%)-159\r"
)
SHAKESPEARE_VOCABULARY_SIZE = NUM_SPECIAL + len(_CHARACTERS) + 1


def emnist(features: Features) -> Features:
    """Images of EMNIST: TensorFlow Federated stores white paper as 1, networks expect 0.

    Args:
      features: `pixels` `[rows, 28, 28]` or flat, within [0, 1], and `label` `[rows]`.

    Returns:
      `x` `[rows, 28, 28, 1]`, float32, 1 - pixels; `y` `[rows]`, int32.

    Raises:
      ValueError: A feature is missing, or of another shape.
    """
    pixels, label = _take(features, "pixels", "label")
    x = 1 - _images("pixels", pixels, (28, 28, 1)).astype(np.float32)
    return {"x": x, "y": label.astype(np.int32)}


def emnist_domain(client_id: Hashable) -> int:
    """Who wrote a client's characters: 0 students of a high school, 1 the staff of the Census.

    These are the domains of agnostic federated averaging. Numbers of writers from 2100 to 2599 are
    students; source: Grother and Hanaoka (2016), "NIST Special Database 19", second edition.

    Args:
      client_id: As in TensorFlow Federated's file, `f2109_72`, or FedJAX's, where 16 digits of a
        hash and a colon come before it.

    Raises:
      ValueError: `client_id` is of another form.

    >>> emnist_domain("f2109_72"), emnist_domain(b"0123456789abcdef:f3987_02")
    (0, 1)
    """
    text = _bytes(client_id) if isinstance(client_id, str | bytes) else b""
    match = re.fullmatch(rb"(?:[0-9a-f]{16}:)?f(\d{4})_\d\d", text)
    if match is None:
        raise ValueError(
            f"client_id is {client_id!r}; pass one of EMNIST's, such as f2109_72, or leave domain"
            " out."
        )
    return int(not 2100 <= int(match[1]) <= 2599)


def cifar(crop: int = 24) -> Callable[[Features], Features]:
    """Images of CIFAR: the middle of each, standardised.

    Source: Reddi et al. (2021), "Adaptive Federated Optimization", appendix C; they train on
    random crops, for which see `random_crop`, and evaluate on the middle.

    Args:
      crop: Height and width of the crop; 32 keeps the image.

    Returns:
      A transform from `image` `[rows, 32, 32, 3]` or flat, and `label` `[rows]`, to `x`
      `[rows, crop, crop, 3]`, float32, and `y` `[rows]`, int32. A `coarse_label`, which CIFAR-100
      has, becomes `coarse` `[rows]`, int32.

    Raises:
      ValueError: `crop` is not within 1 to 32.
    """
    crop = _validate.integer("crop", crop, minimum=1, maximum=32)
    start = (32 - crop) // 2

    def transform(features: Features) -> Features:
        image, label = _take(features, "image", "label")
        image = _images("image", image, (32, 32, 3))
        middle = image[:, start : start + crop, start : start + crop].astype(np.float32)
        examples = {"x": standardize(middle), "y": label.astype(np.int32)}
        if "coarse_label" in features:
            examples["coarse"] = features["coarse_label"].astype(np.int32)
        return examples

    return transform


def standardize(images: np.ndarray) -> np.ndarray:
    r"""Gives each image mean 0 and standard deviation 1, as `tf.image` does.

    $(x - \bar x) / \max(\sigma, 1/\sqrt N)$ over the $N$ values of an image; the floor keeps a
    uniform image at 0. FedJAX floors at $\sqrt N$.

    Args:
      images: `[rows, height, width, channels]`.

    >>> standardize(np.array([0.0, 2.0]).reshape(1, 2, 1, 1)).ravel().tolist()
    [-1.0, 1.0]
    """
    axes = tuple(range(1, images.ndim))
    floor = 1 / math.sqrt(math.prod(images.shape[1:]))
    std = np.maximum(images.std(axis=axes, keepdims=True), floor)
    return (images - images.mean(axis=axes, keepdims=True)) / std


def random_crop(key: jax.Array, images: jax.Array, size: int) -> jax.Array:
    """Crops each image at a place of its own, and mirrors half of them; for use in a loss.

    Args:
      key: Typed key.
      images: `[batch, height, width, channels]`.
      size: Height and width of the crop.

    Returns:
      `[batch, size, size, channels]`.
    """

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        key_row, key_column, key_flip = jax.random.split(key, 3)
        row = jax.random.randint(key_row, (), 0, image.shape[0] - size + 1)
        column = jax.random.randint(key_column, (), 0, image.shape[1] - size + 1)
        crop = jax.lax.dynamic_slice(image, (row, column, 0), (size, size, image.shape[2]))
        return jnp.where(jax.random.bernoulli(key_flip), crop[:, ::-1], crop)

    return jax.vmap(one)(jax.random.split(key, images.shape[0]), images)


def shakespeare(sequence_length: int = 80) -> Callable[[Features], Features]:
    """Text of Shakespeare as characters, to predict each from those before it.

    All snippets of a client are joined, each between `BOS` and `EOS`, and cut into sequences; only
    the last is padded. Ids are FedJAX's: 86 characters from 3, 89 for all others, so that
    a model needs a vocabulary of `SHAKESPEARE_VOCABULARY_SIZE` = 90.

    Args:
      sequence_length: Length of a sequence.

    Returns:
      A transform from `snippets` `[rows]`, bytes, to `x` and `y` `[sequences, sequence_length]`,
      int32, y one character ahead of x.

    Raises:
      ValueError: `sequence_length` is not positive.

    >>> features = shakespeare(3)({"snippets": np.array([b"dh", b"l"], object)})
    >>> features["x"].tolist(), features["y"].tolist()
    ([[1, 3, 4], [2, 1, 5]], [[3, 4, 2], [1, 5, 2]])
    """
    sequence_length = _validate.integer("sequence_length", sequence_length, minimum=1)
    table = np.full(256, SHAKESPEARE_VOCABULARY_SIZE - 1, np.int32)
    table[list(_CHARACTERS)] = NUM_SPECIAL + np.arange(len(_CHARACTERS))

    def transform(features: Features) -> Features:
        (snippets,) = _take(features, "snippets")
        texts = list(map(_bytes, snippets))
        sizes = np.array([len(text) for text in texts], np.int64)
        ends = np.cumsum(sizes + 2)
        text = np.full(ends[-1] if texts else 1, EOS, np.int32)
        text[ends - sizes - 2] = BOS
        inside = np.arange(sizes.sum()) + 2 * np.repeat(np.arange(len(texts)), sizes) + 1
        text[inside] = table[np.frombuffer(b"".join(texts), np.uint8)]
        num_sequences = -(-(len(text) - 1) // sequence_length)
        sequences = np.full((2, num_sequences * sequence_length), PAD, np.int32)
        sequences[:, : len(text) - 1] = text[:-1], text[1:]
        x, y = sequences.reshape(2, num_sequences, sequence_length)
        return {"x": x, "y": y}

    return transform


def stackoverflow(
    vocabulary: Sequence[str],
    max_length: int = 20,
    *,
    num_oov_buckets: int = 1,
    domain: bool = False,
) -> Callable[[Features], Features]:
    """Sentences of Stack Overflow as words, to predict each from those before it.

    Ids are FedJAX's: words from 3 in the order of the vocabulary, and all others from
    `3 + len(vocabulary)`, so that a model needs `3 + len(vocabulary) + num_oov_buckets`.

    Args:
      vocabulary: The known words, the most frequent first; see `read_vocabulary`.
      max_length: Length to which sentences are cut or padded.
      num_oov_buckets: Number of ids that the other words share, by the hash that TensorFlow deals
        them out by (FarmHash's Fingerprint64). More than one take the package pyfarmhash.
      domain: Add `domain` `[rows]`, int32, from the feature `type`: 0 for questions, 1 for answers.

    Returns:
      A transform from `tokens` `[rows]`, bytes with spaces between the words, to `x` and `y`
      `[rows, max_length]`, int32, y one word ahead of x: x begins with `BOS`, y ends with `EOS`.

    Raises:
      ValueError: A word comes twice, or a number is not positive.
      ImportError: pyfarmhash is missing.

    >>> features = stackoverflow(["a", "b"], 4)({"tokens": np.array([b"b c", b"a"], object)})
    >>> features["x"].tolist(), features["y"].tolist()
    ([[1, 4, 5, 0], [1, 3, 0, 0]], [[4, 5, 2, 0], [3, 2, 0, 0]])
    """
    max_length = _validate.integer("max_length", max_length, minimum=1)
    ids = _numbered("vocabulary", vocabulary, NUM_SPECIAL)
    bucket = _oov_bucket(_validate.integer("num_oov_buckets", num_oov_buckets, minimum=1))

    def word_id(word: bytes) -> int:
        return ids[word] if word in ids else NUM_SPECIAL + len(ids) + bucket(word)

    def transform(features: Features) -> Features:
        (tokens,) = _take(features, "tokens")
        sentences = [_bytes(text).split(b" ", max_length)[:max_length] for text in tokens]
        sizes = np.array([len(words) for words in sentences], np.int64)
        row = np.repeat(np.arange(len(sentences)), sizes)
        column = np.arange(row.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        text = np.full((len(sentences), max_length + 2), PAD, np.int32)
        text[:, 0] = BOS
        text[row, column + 1] = [word_id(word) for words in sentences for word in words]
        text[np.arange(len(sentences)), sizes + 1] = EOS
        x = np.where(np.arange(max_length) <= sizes[:, None], text[:, :max_length], PAD)
        examples = {"x": x, "y": text[:, 1 : max_length + 1]}
        if domain:
            examples["domain"] = _post_domain(features)
        return examples

    return transform


def stackoverflow_tags(
    vocabulary: Sequence[str], tags: Sequence[str], max_length: int = 100
) -> Callable[[Features], Features]:
    """Posts of Stack Overflow as bags of words, to predict their tags.

    A bag has the words of a sentence and of the title. It is kept as the ids of its words, which
    take less room than 10,000 numbers, and the model makes shares of them.

    Source: Reddi et al. (2021), "Adaptive Federated Optimization", appendix C, and the code that
    goes with it: 10,000 words and 500 tags, the most frequent ones.

    Args:
      vocabulary: The known words, such as `read_vocabulary("stackoverflow.word_count")`.
      tags: The known tags, such as `read_vocabulary("stackoverflow.tag_count", 500)`; others are
        left out.
      max_length: Length to which bags are cut or padded.

    Returns:
      A transform from `tokens` and `title` `[rows]`, bytes with spaces between the words, and
      `tags` `[rows]`, bytes with bars in between, to `x` `[rows, max_length]`, int32: 0 pads, words
      follow from 1, and the last id is of all that are unknown; and `y` `[rows, tags]`, bool.

    Raises:
      ValueError: A word or tag comes twice, or `max_length` is not positive.

    >>> posts = {"tokens": [b"a c"], "title": [b"b"], "tags": [b"jax|xla"]}
    >>> features = stackoverflow_tags(["a", "b"], ["jax", "c++"], 4)(posts)
    >>> features["x"].tolist(), features["y"].tolist()
    ([[1, 3, 2, 0]], [[True, False]])
    """
    max_length = _validate.integer("max_length", max_length, minimum=1)
    word_ids, tag_ids = _numbered("vocabulary", vocabulary, 1), _numbered("tags", tags, 0)

    def transform(features: Features) -> Features:
        tokens, titles, tagged = _take(features, "tokens", "title", "tags")
        x = np.zeros((len(tokens), max_length), np.int32)
        y = np.zeros((len(tokens), len(tag_ids)), bool)
        for row, (text, title, names) in enumerate(zip(tokens, titles, tagged, strict=True)):
            words = b" ".join((_bytes(text), _bytes(title))).split()[:max_length]
            x[row, : len(words)] = [word_ids.get(word, len(word_ids) + 1) for word in words]
            y[row, [tag_ids[name] for name in _bytes(names).split(b"|") if name in tag_ids]] = True
        return {"x": x, "y": y}

    return transform


def _numbered(name: str, words: Sequence[str], first: int) -> dict[bytes, int]:
    ids = {word.encode(): i for i, word in enumerate(words, first)}
    if len(ids) != len(words):
        raise ValueError(f"{name} has {len(words)} words, but {len(ids)} distinct ones.")
    return ids


def _oov_bucket(num_buckets: int) -> Callable[[bytes], int]:
    """Which bucket `tf.lookup.StaticVocabularyTable` deals an unknown word into."""
    if num_buckets == 1:
        return lambda word: 0
    try:
        fingerprint = importlib.import_module("farmhash").fingerprint64
    except ImportError as error:
        raise ImportError(
            f"num_oov_buckets is {num_buckets}, and the hash of words is in a package that is not"
            " installed; run: pip install pyfarmhash",
            name="farmhash",
        ) from error
    return lambda word: fingerprint(word) % num_buckets


def _post_domain(features: Features) -> np.ndarray:
    (kinds,) = _take(features, "type")
    domains = {b"question": 0, b"answer": 1}
    if unknown := {_bytes(kind) for kind in kinds} - set(domains):
        raise ValueError(f"feature 'type' holds {min(unknown)!r}, not question or answer")
    return np.array([domains[_bytes(kind)] for kind in kinds], np.int32)


def read_vocabulary(path: str | os.PathLike[str], size: int = 10_000) -> list[str]:
    """The first words of a list of words and counts, such as `stackoverflow.word_count`.

    Args:
      path: A text file, one word per line, what follows it left out.
      size: Number of words.

    Raises:
      ValueError: The file has fewer words.
    """
    with open(path, encoding="utf-8") as file:
        words = [
            line.split()[0] for line, _ in zip(file, range(size), strict=False) if line.strip()
        ]
    if len(words) < size:
        raise ValueError(f"{os.fspath(path)} has {len(words)} words; lower size ({size}).")
    return words


def _take(features: Features, *names: str) -> list[np.ndarray]:
    if missing := [name for name in names if name not in features]:
        raise ValueError(f"it has features {sorted(features)} and no {missing[0]!r}")
    return [features[name] for name in names]


def _images(name: str, feature: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if math.prod(feature.shape[1:]) != math.prod(shape):
        raise ValueError(f"feature {name!r} has shape {feature.shape}, not [rows, {shape}]")
    return feature.reshape(-1, *shape)


def _bytes(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text
