"""What upstream LLaVA (llava-torch 1.2.2) needs: our towers, transformers 5, a machine without CUDA.

Each module changes upstream's code at run time, only what is named in it, and only once upstream was imported
(`llava_hook` calls them). Nothing here is used by our own model code.
"""
