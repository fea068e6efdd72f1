"""SimpleCNN: one convolution, one fully connected layer; 41,418 parameters."""

from cnnc.frontends.dsl import Tensor, conv, flatten, linear, max_pool, network, relu


@network(x=(3, 32, 32))
def simple_cnn(x: Tensor) -> Tensor:
    """Classify 32x32 colour pictures into 10 classes."""
    x = x >> conv(16, 3, pad=1, name="conv1") >> relu >> max_pool(2)
    return x >> flatten >> linear(10, name="fc1")
