"""The offline tools: ``holdfast ckpt COMMAND``. One module per command; `cli` finds it.

None needs a GPU or a process group. All stream: what they hold at once is bounded by ``--max-memory``. A source is
never changed. A destination exists when its last file does (root, index, or the renamed folder), and a command that was
interrupted goes on where it stopped when it is repeated.
"""
