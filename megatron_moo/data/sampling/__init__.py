"""Which language and which samples each gradient row of a step takes, and the micro-batches of them."""
