"""LeNet-5 (LeCun, Bottou, Bengio, Haffner, *Gradient-based learning applied to document recognition*, 1998, figure 2).

Two convolutions, two subsamplings, three fully connected layers, tanh throughout.  As everywhere since, every
map of the second convolution sees all six maps of the first, the subsampling is a plain mean, and the output is
linear; that makes 61,706 parameters.
"""

from cnnc.frontends.dsl import Tensor, avg_pool, conv, flatten, linear, network, tanh


@network(x=(1, 32, 32))
def lenet5(x: Tensor) -> Tensor:
    """Read a handwritten digit of 32x32 pixels."""
    x = x >> conv(6, 5, name="conv1") >> tanh >> avg_pool(2)
    x = x >> conv(16, 5, name="conv2") >> tanh >> avg_pool(2)
    return x >> flatten >> linear(120, name="fc1") >> tanh >> linear(84, name="fc2") >> tanh >> linear(10, name="fc3")
