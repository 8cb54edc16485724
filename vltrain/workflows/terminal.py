"""A conversation in the terminal, or one question and its answer: `vltrain chat MODEL`."""

import contextlib
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image

from vltrain.data.pictures import Pictures
from vltrain.errors import VltrainError
from vltrain.evaluation.compiled import CompiledSteps, reason_against
from vltrain.models.catalog import is_chat_tuned
from vltrain.models.hub import resolve_model
from vltrain.workflows.answering import load_for_answers
from vltrain.workflows.quiet import hide_weight_bars
from vltrain.workflows.talk import Manner, Talk, question_turn

HELP = """\
/image PATH   show a picture with the next question; several, one after the other
/box [FILE]   save the last picture with the boxes of the last answer drawn on it
/save FILE    add the conversation to a training file (JSON)
/reset        forget the conversation
/help         this
/quit         leave; so does Ctrl-D
Anything else is asked. Ctrl-C stops an answer. A blank first lets a question begin with /."""


def ask_once(
    model: str,
    prompt: str,
    images: Sequence[str],
    manner: Manner,
    pictures: Pictures,
    *,
    adapter: Path | None = None,
    seed: int = 0,
    compiled: bool | None = None,
) -> None:
    """Print a model's answer to one question while it is made.

    Args:
        model: a folder of a base, a merged model or an adapter, or a name on the hub.
        prompt: the question; may have pictures as `<img>path</img>`.
        images: paths of pictures that come before it.
        manner: how the model is asked.
        pictures: where pictures are looked up.
        adapter: the folder of an adapter to put beside the model.
        seed: of what is drawn.
        compiled: whether the step of decoding is compiled first, which one short answer does not
            pay for; it is not unless this is True.

    Raises:
        VltrainError: what is wrong with question and pictures, before the model is loaded.
    """
    if not prompt.strip() and not images:
        raise VltrainError.at("--prompt", what="it is empty", fix="write a question")
    question_turn(prompt, images, pictures, first=1)
    talk = _talk(model, adapter, images, manner, pictures, seed, compiled or False)
    talk.answer(talk.prepare(prompt), _print_piece)
    print()


def converse(
    model: str,
    images: Sequence[str],
    manner: Manner,
    pictures: Pictures,
    *,
    adapter: Path | None = None,
    seed: int = 0,
    compiled: bool | None = None,
) -> None:
    """Talk with a model, line by line from stdin, until it ends or says /quit.

    Args:
        images: paths of pictures that come before the first question.
        model, manner, pictures, adapter, seed: as for `ask_once`.
        compiled: whether the step of decoding is compiled; None: where that can be done.

    Raises:
        VltrainError: the model cannot be loaded, or one of `images` cannot be shown. What goes
            wrong later is said, and the conversation goes on.
    """
    question_turn("", images, pictures, first=1)
    talk = _talk(model, adapter, images, manner, pictures, seed, compiled)
    if not (manner.completes or adapter or is_chat_tuned(resolve_model(model).path)):
        print("note: nothing says that this model was tuned to chat; see --complete")
    print(f"{model}: /help lists the commands, /quit leaves")
    if talk.is_compiled:
        print("the first answer waits for a compiler, the others are faster; see --no-compile")
    Terminal(talk).run()


def _talk(
    model: str,
    adapter: Path | None,
    images: Sequence[str],
    manner: Manner,
    pictures: Pictures,
    seed: int,
    compiled: bool | None,
) -> Talk:
    """A conversation that has not begun, with pictures that wait."""
    if compiled and not torch.cuda.is_available():
        raise VltrainError.at(
            "--compile",
            what="there is no NVIDIA GPU here",
            fix="leave it out: nothing else changes",
        )
    hide_weight_bars()
    network, processor = load_for_answers(resolve_model(model).path, adapter)
    against = None if compiled is False else reason_against(network)
    if compiled and against is not None:
        raise VltrainError.at("--compile", what=against, fix="leave it out")
    steps = CompiledSteps(network) if compiled is not False and against is None else None
    torch.manual_seed(seed)
    talk = Talk(network, processor, manner, pictures, steps)
    talk.waiting += images
    return talk


class Terminal:
    """Reads lines, does what they say, and says what went wrong."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk
        self._identity = _identity()
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/box": self._box,
            "/save": self._save,
            "/reset": self._reset,
            "/help": lambda _: print(HELP),
        }

    def run(self) -> None:
        """Go on until the lines end or one is /quit."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):  # not on Windows
                import readline  # noqa: F401 (gives `input` editing and a history)
        while True:
            try:
                line = self._read()
                if line.strip() == "/quit":
                    return
                self._do(line)
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\nstopped; what was not answered is forgotten. /quit or Ctrl-D leaves")
            except UnicodeDecodeError as error:
                print(f"error: the line is not UTF-8 ({error})")
            except torch.OutOfMemoryError:
                print("\nerror: the GPU's memory does not suffice\n  fix: /reset, or ask less")
            except (VltrainError, OSError) as error:
                print(f"error: {error}")

    def _read(self) -> str:
        """The next line; one that nobody typed is shown, as a typed one is."""
        waiting = len(self._talk.waiting)
        pictures = f"[{waiting} picture{'s' if waiting > 1 else ''}] " if waiting else ""
        line = input(f"{pictures}> ")
        if not sys.stdin.isatty():
            print(line)
        return line

    def _do(self, line: str) -> None:
        if not line.startswith("/"):
            if line.strip():
                self._ask(line.strip())
            return
        word, _, rest = line.partition(" ")
        if word not in self._commands:
            raise VltrainError.at(
                word,
                what="there is no such command",
                fix="/help lists them; put a blank before a question that begins with /",
            )
        self._commands[word](rest.strip())

    def _ask(self, text: str) -> None:
        asked = self._talk.prepare(text)
        if asked.left_out:
            print(f"(the first {asked.left_out} of the exchanges, with their pictures, are left")
            print(" out: the window has no room for them; /reset begins anew)")
        self._talk.answer(asked, _print_piece)
        print()

    def _image(self, path: str) -> None:
        if len(path) > 1 and path[0] == path[-1] and path[0] in "'\"":
            path = path[1:-1]
        if not path:
            raise VltrainError.at("/image", what="no picture is named", fix="write /image PATH")
        self._talk.show(str(Path(path).expanduser()) if path.startswith("~") else path)

    def _box(self, name: str) -> None:
        drawn = self._talk.boxes()
        file = Path(name).expanduser() if name else _free_name()
        if file.suffix.lower() not in Image.registered_extensions():
            raise VltrainError.at(
                str(file), what="is no name of a picture", fix="end it with .png or .jpg"
            )
        if file.exists():
            raise VltrainError.at(str(file), what="is there already", fix="write another name")
        drawn.save(file)
        print(f"saved {file}")

    def _save(self, name: str) -> None:
        if not name:
            raise VltrainError.at("/save", what="no file is named", fix="write /save FILE.json")
        file = Path(name).expanduser()
        written, fault = self._talk.save(file, self._identity)
        print(f"saved {written} exchange{'s' if written > 1 else ''} in {file}")
        if fault is not None:
            print(f"the rest is left out, for a run would refuse it: {fault}")

    def _reset(self, _: str) -> None:
        self._talk.reset()
        self._identity = _identity()  # or what follows would replace what was saved
        print("all is forgotten")


def _identity() -> str:
    """An id for the record of a conversation that begins."""
    return f"chat-{datetime.now():%Y%m%d-%H%M%S-%f}"


def _free_name() -> Path:
    """boxes-1.png in the working directory, or the next number that is free."""
    number = 1
    while (file := Path(f"boxes-{number}.png")).exists():
        number += 1
    return file


def _print_piece(text: str) -> None:
    """Print a part of an answer at once, its control characters (of a terminal) made visible."""
    plain = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    print(plain, end="", flush=True)
