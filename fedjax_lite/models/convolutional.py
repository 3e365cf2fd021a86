"""Convolutional networks for small images."""

import functools
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedjax_lite import _validate
from fedjax_lite.models._tasks import classifier
from fedjax_lite.models.model import Model
from fedjax_lite.xla.fusion import apart


def max_pool(x: jax.Array) -> jax.Array:
    """The largest value of each 2 x 2 window; an odd last row or column is left out.

    Args:
      x: `[batch, height, width, channels]`.
    """
    n, h, w, c = x.shape
    return _largest(x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c))


def _corners(windows: jax.Array) -> list[jax.Array]:
    return [windows[:, :, i, :, j] for i in (0, 1) for j in (0, 1)]


@jax.custom_jvp
def _largest(windows: jax.Array) -> jax.Array:
    """The maximum over the axes 2 and 4, of length 2.

    The corners of a window, one by one, are a single loop over the output on a CPU, and so is the
    gradient; those of `max` and of `reduce_window` write masks and counts to memory. The loop is
    a vectorised one unless it is fused into what flattens the output.
    """
    word = jax.lax.bitcast_convert_type(windows.ravel()[:1].sum().astype(jnp.float32), jnp.uint32)
    return apart(lambda: functools.reduce(jnp.maximum, _corners(windows)), word)


@_largest.defjvp
def _largest_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (windows,), (tangent,) = primals, tangents
    largest = _largest(windows)
    # As with `max`, those that are equally large share.
    is_largest = windows == largest[:, :, None, :, None]
    count = sum(jnp.where(corner == largest, 1, 0) for corner in _corners(windows))
    return largest, jnp.where(is_largest, tangent, 0).sum((2, 4)) / count


class _CNN(nn.Module):
    num_classes: int
    dropout_rates: tuple[float, float]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        glorot = nn.initializers.glorot_uniform()
        after_pool, after_dense = self.dropout_rates
        for width in (32, 64):
            x = nn.relu(nn.Conv(width, (3, 3), padding="VALID", kernel_init=glorot)(x))
        x = nn.Dropout(after_pool, deterministic=not train)(max_pool(x))
        x = nn.relu(nn.Dense(128, kernel_init=glorot)(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(after_dense, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=glorot)(x)


def emnist_cnn(num_classes: int = 62, *, dropout_rates: tuple[float, float] = (0.25, 0.5)) -> Model:
    """Two convolutions and two dense layers, for EMNIST.

    | layer                         | output         | parameters |
    |-------------------------------|----------------|-----------:|
    | convolution 3 x 3, ReLU       | `[26, 26, 32]` |        320 |
    | convolution 3 x 3, ReLU       | `[24, 24, 64]` |     18,496 |
    | max-pooling 2 x 2, dropout    | `[12, 12, 64]` |            |
    | dense, ReLU, dropout          | `[128]`        |  1,179,776 |
    | dense                         | `[62]`         |      7,998 |
    | total                         |                |  1,206,590 |

    Source: Reddi et al. (2021), "Adaptive Federated Optimization". Kernels start from
    Glorot's uniform distribution, biases at zero, as in Keras.

    Args:
      num_classes: Number of classes; 10 for digits only.
      dropout_rates: What dropout leaves out after pooling and after the first dense layer.

    Returns:
      A `Model` on the features `x` `[batch, 28, 28, 1]` and `y` `[batch]`, integer classes,
      with the metrics `loss` and `accuracy`.

    Raises:
      ValueError: `num_classes` is below 2.
    """
    return classifier(_CNN(num_classes, dropout_rates), (28, 28, 1), num_classes)


def cifar_cnn(num_classes: int = 10, *, dropout_rates: tuple[float, float] = (0.25, 0.5)) -> Model:
    """Two convolutions and two dense layers, for CIFAR.

    | layer                         | output         | parameters |
    |-------------------------------|----------------|-----------:|
    | convolution 3 x 3, ReLU       | `[30, 30, 32]` |        896 |
    | convolution 3 x 3, ReLU       | `[28, 28, 64]` |     18,496 |
    | max-pooling 2 x 2, dropout    | `[14, 14, 64]` |            |
    | dense, ReLU, dropout          | `[128]`        |  1,605,760 |
    | dense                         | `[10]`         |      1,290 |
    | total                         |                |  1,626,442 |

    Source: `simple_cnn` of pfl-research's CIFAR10 benchmark (Granqvist et al., 2024). Kernels
    start from Glorot's uniform distribution, biases at zero.

    Args:
      num_classes: Number of classes.
      dropout_rates: What dropout leaves out after pooling and after the first dense layer.

    Returns:
      A `Model` on the features `x` `[batch, 32, 32, 3]` and `y` `[batch]`, integer classes,
      with the metrics `loss` and `accuracy`.

    Raises:
      ValueError: `num_classes` is below 2.
    """
    return classifier(_CNN(num_classes, dropout_rates), (32, 32, 3), num_classes)


class _MNISTCNN(nn.Module):
    num_classes: int
    widths: tuple[int, ...]
    hidden: int
    padding: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        glorot = nn.initializers.glorot_uniform()
        for width in self.widths:
            x = max_pool(
                nn.relu(nn.Conv(width, (5, 5), padding=self.padding, kernel_init=glorot)(x))
            )
        x = nn.relu(nn.Dense(self.hidden, kernel_init=glorot)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes, kernel_init=glorot)(x)


def mnist_cnn(
    num_classes: int = 10,
    *,
    widths: Sequence[int] = (32, 64),
    hidden: int = 512,
    padding: Literal["SAME", "VALID"] = "SAME",
) -> Model:
    """Two convolutions and two dense layers, for MNIST.

    | layer                         | output         | parameters |
    |-------------------------------|----------------|-----------:|
    | convolution 5 x 5, ReLU       | `[28, 28, 32]` |        832 |
    | max-pooling 2 x 2             | `[14, 14, 32]` |            |
    | convolution 5 x 5, ReLU       | `[14, 14, 64]` |     51,264 |
    | max-pooling 2 x 2             | `[7, 7, 64]`   |            |
    | dense, ReLU                   | `[512]`        |  1,606,144 |
    | dense                         | `[10]`         |      5,130 |
    | total                         |                |  1,663,370 |

    Source: McMahan et al. (2017), "Communication-Efficient Learning of Deep Networks from
    Decentralized Data". Kernels start from Glorot's uniform distribution, biases at zero.

    Args:
      num_classes: Number of classes.
      widths: Channels of the two convolutions.
      hidden: Width of the first dense layer.
      padding: Of the convolutions. Without, `"VALID"`, there are 582,026 parameters, as in PFLlib;
        with 20, 50 and 500 as widths as well, 431,080, as in ByzFL.

    Returns:
      A `Model` on the features `x` `[batch, 28, 28, 1]` and `y` `[batch]`, integer classes,
      with the metrics `loss` and `accuracy`.

    Raises:
      ValueError: `num_classes` is below 2, a width is not positive, or `padding` is neither.
    """
    widths = [_validate.integer("widths", width, minimum=1) for width in widths]
    hidden = _validate.integer("hidden", hidden, minimum=1)
    _validate.choice("padding", padding, ("SAME", "VALID"))
    module = _MNISTCNN(num_classes, tuple(widths), hidden, padding)
    return classifier(module, (28, 28, 1), num_classes)


class _LeNet(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Uniform within 1/sqrt(inputs), as PyTorch draws them.
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        for width in (6, 16):
            x = nn.relu(nn.Conv(width, (5, 5), padding="VALID", kernel_init=uniform)(x))
            x = max_pool(x)
        x = x.reshape(x.shape[0], -1)
        for width in (120, 84):
            x = nn.relu(nn.Dense(width, kernel_init=uniform)(x))
        return nn.Dense(self.num_classes, kernel_init=uniform)(x)


def lenet(input_shape: Sequence[int] = (32, 32, 3), num_classes: int = 10) -> Model:
    r"""Two convolutions and three dense layers, after LeNet-5.

    | layer                         | output         | parameters |
    |-------------------------------|----------------|-----------:|
    | convolution 5 x 5, ReLU       | `[28, 28, 6]`  |        456 |
    | max-pooling 2 x 2             | `[14, 14, 6]`  |            |
    | convolution 5 x 5, ReLU       | `[10, 10, 16]` |      2,416 |
    | max-pooling 2 x 2             | `[5, 5, 16]`   |            |
    | dense, ReLU                   | `[120]`        |     48,120 |
    | dense, ReLU                   | `[84]`         |     10,164 |
    | dense                         | `[10]`         |        850 |
    | total                         |                |     62,006 |

    Images of 28 x 28 x 1 give 44,426 parameters. Source: Li et al. (2022), "Federated Learning on
    Non-IID Data Silos: An Experimental Study", and the `niid_bench` baseline of Flower. Kernels
    start uniform within $\pm 1/\sqrt{n}$ for $n$ inputs as in PyTorch, biases at zero.

    Args:
      input_shape: Height, width and channels of an image, at least 16 x 16.
      num_classes: Number of classes.

    Returns:
      A `Model` on the features `x` `[batch, *input_shape]` and `y` `[batch]`, integer classes,
      with the metrics `loss` and `accuracy`.

    Raises:
      ValueError: The image is too small, or `num_classes` is below 2.
    """
    if len(input_shape) != 3 or min(input_shape[:2]) < 16:
        raise ValueError(
            f"input_shape is {tuple(input_shape)}; pass (height, width, channels) of images of at"
            " least 16 x 16, of which pooling leaves something."
        )
    return classifier(_LeNet(num_classes), input_shape, num_classes)


class _ResNet18(nn.Module):
    num_classes: int
    num_groups: int | None
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        def convolve(x: jax.Array, width: int, size: int, stride: int) -> jax.Array:
            # PyTorch's padding: "SAME" is off by one pixel where the stride is 2.
            convolution = nn.Conv(
                width,
                (size, size),
                (stride, stride),
                padding=size // 2,
                use_bias=False,
                kernel_init=nn.initializers.he_normal(),
            )
            return normalise(convolution(x))

        def normalise(x: jax.Array) -> jax.Array:
            if self.num_groups is not None:
                return nn.GroupNorm(self.num_groups, epsilon=1e-5)(x)
            real = None if mask is None else mask[:, None, None, None]
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x, mask=real)

        x = nn.relu(convolve(x, self.width, 3, 1))
        for stage in range(4):
            for block in range(2):
                width, stride = self.width * 2**stage, 2 if stage > 0 and block == 0 else 1
                y = nn.relu(convolve(x, width, 3, stride))
                y = convolve(y, width, 3, 1)
                if stride > 1:
                    x = convolve(x, width, 1, stride)
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01))(x.mean((1, 2)))


def resnet18(
    num_classes: int = 10,
    *,
    norm: str = "group",
    input_shape: Sequence[int] = (32, 32, 3),
    num_groups: int = 2,
    width: int = 64,
) -> Model:
    r"""The residual network of 18 layers in its form for small images.

    | layer                                       | output          | parameters |
    |---------------------------------------------|-----------------|-----------:|
    | convolution 3 x 3, norm, ReLU               | `[32, 32, 64]`  |      1,856 |
    | 2 residual blocks                           | `[32, 32, 64]`  |    147,968 |
    | 2 residual blocks, the first of stride 2    | `[16, 16, 128]` |    525,568 |
    | 2 residual blocks, the first of stride 2    | `[8, 8, 256]`   |  2,099,712 |
    | 2 residual blocks, the first of stride 2    | `[4, 4, 512]`   |  8,393,728 |
    | mean over pixels, dense                     | `[10]`          |      5,130 |
    | total                                       |                 | 11,173,962 |

    A block is $\mathrm{ReLU}(s(x) + f(x))$, where $f$ is convolution 3 x 3, norm, ReLU,
    convolution 3 x 3, norm, and $s$ the identity or, where the shape changes, convolution 1 x 1
    and norm.

    Sources: He et al. (2016), "Deep Residual Learning for Image Recognition"; the norm over two
    groups of channels is that of Reddi et al. (2021), "Adaptive Federated Optimization", after
    Hsieh et al. (2020). Kernels start from He's truncated normal distribution, those of the last
    layer with a standard deviation of 0.01, as in the code that goes with Reddi et al. That code
    has the stem for large images, a convolution 7 x 7 of stride 2 and max-pooling.

    Args:
      num_classes: Number of classes; 100 for CIFAR-100.
      norm: `"group"`, by which examples do not see each other, or `"batch"`, whose running means
        (momentum 0.9) are the model state; padding does not enter them.
      input_shape: Height, width and channels of an image.
      num_groups: Groups of channels of the norm over groups.
      width: Channels of the first layers.

    Returns:
      A `Model` on the features `x` `[batch, *input_shape]` and `y` `[batch]`, integer classes,
      with the metrics `loss` and `accuracy`.

    Raises:
      ValueError: `norm` is neither, `num_groups` does not divide `width`, or `num_classes` is
        below 2.
    """
    _validate.choice("norm", norm, ("group", "batch"))
    if norm == "group" and width % num_groups:
        raise ValueError(
            f"num_groups is {num_groups}, which does not divide width {width}; choose a divisor."
        )
    module = _ResNet18(num_classes, num_groups if norm == "group" else None, width)
    return classifier(module, input_shape, num_classes)
