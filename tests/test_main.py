"""python -m mnops COMMAND."""

from mnops.__main__ import COMMANDS, main


def test_usage(capsys):
    assert main([]) == 2
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(command in usage for command in COMMANDS)


def test_unknown_command(capsys):
    assert main(["nothing"]) == 2
    assert "command must be one of info, train" in capsys.readouterr().err


def test_info(capsys):
    assert main(["info"]) == 0
    assert "op.depthwise_conv2d.cpu" in capsys.readouterr().out
