"""How much a pass that scores holds at a time. Nothing here imports torch, so that a report of memory can read it."""

# Tokens of a forward pass that gathers or copies each layer's weights. At 70B the activations of one layer take some
# 5 GB, and there is enough computation to hide the copy.
STREAMED_TOKENS = 16384
# The same with a backward pass. At 70B the hidden states between the layers take as much.
STREAMED_TOKENS_BACKWARD = 4096
# Logits held at a time; with their gradients some 200 MB.
LOGITS_AT_A_TIME = 2**24
# Columns of a sketch beyond the ranks in question: the last singular values of a sketch are too small.
OVERSAMPLING = 8
