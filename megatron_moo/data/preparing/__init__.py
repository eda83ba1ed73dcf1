"""All of it in parallel: sources to Megatron's indexed files and a manifest."""
