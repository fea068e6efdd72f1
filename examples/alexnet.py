"""AlexNet (Krizhevsky, Sutskever, Hinton, *ImageNet classification with deep convolutional neural networks*, 2012).

`alexnet_2012` is the paper's network, with local response normalisation and the layers split over two GPUs:
60,965,224 parameters.  `alexnet` is the single tower of *One weird trick* (2014) as torchvision has it: 61,100,840.
"""

from cnnc.frontends.dsl import Tensor, adaptive_avg_pool, conv, dropout, flatten, linear, lrn, max_pool, network, relu

norm = lrn(5, alpha=5e-4, beta=0.75, bias=2.0)
pool = max_pool(3, stride=2)


@network(x=(3, 227, 227))
def alexnet_2012(x: Tensor) -> Tensor:
    """The network of the paper (section 3.5): maps of 55, 27 and 13 pixels, then 4096, 4096, 1000."""
    x = x >> conv(96, 11, stride=4, name="conv1") >> relu >> norm >> pool
    x = x >> conv(256, 5, pad=2, groups=2, name="conv2") >> relu >> norm >> pool
    x = x >> conv(384, 3, pad=1, name="conv3") >> relu
    x = x >> conv(384, 3, pad=1, groups=2, name="conv4") >> relu
    x = x >> conv(256, 3, pad=1, groups=2, name="conv5") >> relu >> pool
    x = x >> flatten >> linear(4096, name="fc6") >> relu >> dropout(0.5)
    return x >> linear(4096, name="fc7") >> relu >> dropout(0.5) >> linear(1000, name="fc8")


@network(x=(3, 224, 224))
def alexnet(x: Tensor) -> Tensor:
    """The single-tower form; parameters are named as torchvision's `alexnet`."""
    x = x >> conv(64, 11, stride=4, pad=2, name="features.0") >> relu >> pool
    x = x >> conv(192, 5, pad=2, name="features.3") >> relu >> pool
    x = x >> conv(384, 3, pad=1, name="features.6") >> relu
    x = x >> conv(256, 3, pad=1, name="features.8") >> relu
    x = x >> conv(256, 3, pad=1, name="features.10") >> relu >> pool
    x = x >> adaptive_avg_pool(6) >> flatten
    x = x >> dropout(0.5) >> linear(4096, name="classifier.1") >> relu
    return x >> dropout(0.5) >> linear(4096, name="classifier.4") >> relu >> linear(1000, name="classifier.6")
