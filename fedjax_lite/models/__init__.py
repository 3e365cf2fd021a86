r"""The small models of the field's benchmarks, each a function that returns a `Model`.

| function                    | task, and where its data come from  | parameters |
|-----------------------------|-------------------------------------|-----------:|
| `halfspace_classifier`      | points of the plane, `data.halfspace` |        3 |
| `logistic`, `mlp`           | any classes                         |            |
| `regression`                | any real numbers                    |            |
| `centroids`, `gaussians`    | no labels                           |            |
| `emnist_dense`              | characters, `data.emnist`           |    209,662 |
| `emnist_cnn`                | characters, `data.emnist`           |  1,206,590 |
| `cifar_cnn`                 | photographs, `data.cifar10`         |  1,626,442 |
| `mnist_cnn`                 | digits, `data.mnist`                |  1,663,370 |
| `lenet`                     | photographs, `data.cifar10`         |     62,006 |
| `resnet18`                  | photographs, `data.cifar100`        | 11,173,962 |
| `shakespeare_lstm`          | next character, `data.shakespeare`  |    820,522 |
| `stackoverflow_lstm`        | next word, `data.stackoverflow`     |  4,050,748 |
| `stackoverflow_transformer` | next word, `data.stackoverflow`     |  1,962,912 |
| `stackoverflow_tags`        | tags, `data.stackoverflow_tags`     |  5,000,500 |

Classifiers take `x` `[batch, ...]` and `y` `[batch]`, integer classes. Their loss is the softmax
cross-entropy, and their metrics are `loss` and `accuracy`.

Language models take `x` and `y` `[batch, length]`, integer ids, y one symbol ahead of x, in the
vocabulary of `data.shakespeare` and `data.stackoverflow`: 0 is padding, 1 begins a text, 2 ends
it, and the last id stands for all unknown symbols. Let $R$ be the real tokens of a sequence,
those whose $y_t$ is not padding. The loss of the sequence is
$\frac{1}{|R|} \sum_{t \in R} -\log p(y_t \mid x_1, \dots, x_t)$, and 0 if it has none.

FedJAX divides by the length instead for Shakespeare, and by nothing for Stack Overflow;
pfl-research divides the sum over a batch by the number of its real tokens. The metrics are
averages over tokens, and then over sequences:

| metric                   | tokens                        | correct is                   |
|--------------------------|-------------------------------|------------------------------|
| `loss`                   | real                          |                              |
| `accuracy`               | real                          | the most likely id           |
| `accuracy_in_vocabulary` | real, but not the text's end  | the most likely known symbol |

The last one is FedJAX's: padding, begin, end and unknown are never predicted, so that an unknown
symbol counts as an error.
"""

from fedjax_lite.models.bag_of_words import stackoverflow_tags
from fedjax_lite.models.clusters import centroids, gaussians
from fedjax_lite.models.convolutional import cifar_cnn, emnist_cnn, lenet, mnist_cnn, resnet18
from fedjax_lite.models.dense import (
    emnist_dense,
    halfspace_classifier,
    logistic,
    mlp,
    regression,
)
from fedjax_lite.models.recurrent import shakespeare_lstm, stackoverflow_lstm
from fedjax_lite.models.transformer import stackoverflow_transformer

__all__ = [
    "centroids",
    "cifar_cnn",
    "emnist_cnn",
    "emnist_dense",
    "gaussians",
    "halfspace_classifier",
    "lenet",
    "logistic",
    "mlp",
    "mnist_cnn",
    "regression",
    "resnet18",
    "shakespeare_lstm",
    "stackoverflow_lstm",
    "stackoverflow_tags",
    "stackoverflow_transformer",
]


def __dir__() -> list[str]:
    return __all__
