"""Networks of convolutions and matrices in any order: their groups, how they are cut, loaded and saved.

A decoder's parts are known from its family. Those of any other network are found in the graph that its `forward`
makes: which layers must lose a channel together is asked of torch-pruning's dependency graph, and then proven by
cutting a stand-in of the network with random weights and comparing it with a masked one. The parts of transformers'
encoders, of images and of texts, are known as well (`encoders`), and are proven in the same way.
"""
