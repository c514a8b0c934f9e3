"""One run from recipe to export: the stages in order, each skipped if sealed, resumed if torn, under one run folder.

Started by launch/train.py under the DeepSpeed launcher, torchrun or plain python:
`deepspeed launch/train.py --config launch/recipes/nano_demo.yaml`
"""
