"""The classical filters, each a network of one fixed convolution, and edges by gradients.

Gonzalez and Woods, *Digital Image Processing*, chapters 3 and 10.
"""

import numpy as np

from cnnc.frontends.dsl import Tensor, apply, box, convolve, correlate, gaussian, network, prewitt, sharpen, sobel
from cnnc.ops.unary import Sqrt

CROSS = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]])
EMBOSS = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])


@network(x=(1, 128, 128))
def filters(x: Tensor) -> dict[str, Tensor]:
    """Blur, sharpen and differentiate a grey picture."""
    return {
        "box": x >> box(3),
        "gaussian": x >> gaussian(5, sigma=1.0),
        "sharpen": x >> sharpen,
        "sobel_x": x >> sobel(axis=-1),
        "sobel_y": x >> sobel(axis=-2),
        "prewitt_x": x >> prewitt(axis=-1),
        "prewitt_y": x >> prewitt(axis=-2),
    }


@network(x=(1, 128, 128))
def edges(x: Tensor) -> Tensor:
    """The length of Sobel's gradient of the blurred picture: what Canny's detector begins with."""
    x = x >> gaussian(5, sigma=1.4)
    across, down = sobel(x, axis=-1), sobel(x, axis=-2)
    return apply(Sqrt(), across * across + down * down)


@network(x=(1, 128, 128))
def emboss(x: Tensor) -> dict[str, Tensor]:
    """The same kernel slid as it stands (correlation), and flipped both ways first (convolution)."""
    return {"correlated": x >> correlate(EMBOSS), "convolved": x >> convolve(EMBOSS)}


@network(x=(1, 5, 5))
def cross(x: Tensor) -> Tensor:
    """The textbook's example of correlation without padding: 5x5 in, 3x3 out."""
    return x >> correlate(CROSS, pad="valid")
