"""`push_to_hub`: a proved checkpoint on the hub, with a card and a manifest that name no folder of this machine."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import CheckpointError
from secateur.files.checkpoint import CARD_FILE
from secateur.files.digest import model_digest
from secateur.files.packed import is_packed
from secateur.files.reading import read_text
from secateur.record.card import COPIED, hub_dataset, perplexity_name, public_card, source_name
from secateur.record.manifest import FILE_NAME, Manifest, harmless, paths_below, read_manifest, text_of
from secateur.record.publication import base_of, hub_id, last_part, published
from secateur.record.verify import verify
from secateur.report.evaluations import Evaluation, kept_evaluations
from secateur.report.settings import PushSettings
from secateur.runs.options import taking

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from rich.console import RenderableType

LICENCES = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)[\w-]*(\.\w+)?", re.IGNORECASE)
EVAL_RESULTS = ".eval_results/secateur.yaml"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
TEXTS = (".json", ".md", ".txt", ".jinja", ".yaml", ".yml", ".py")


@dataclass(frozen=True)
class Push:
    """What was published, and where it is."""

    repository: str
    url: str  # of the commit, or of the pull request
    commit: str
    pull_request: str | None
    base_model: str
    files: tuple[str, ...]
    deleted: tuple[str, ...]  # files of what was there before
    left_out: tuple[str, ...]  # files of the folder that are no part of the checkpoint
    evaluations: int  # in the card

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {**vars(self), "files": list(self.files), "deleted": list(self.deleted), "left_out": list(self.left_out)}


@taking(PushSettings)
def push_to_hub(settings: PushSettings) -> Push:
    """What was published of a checkpoint that Secateur wrote, as one commit in a repository of the Hugging Face Hub.

    The checkpoint is verified first. Its files go there as they are, but for the manifest and the model card: they lose
    the folders of this machine, and name the repository, and the dense model by its hub id, which is `base_model` or
    that of the model that was pruned. The card has the figures that `evaluations`, a store, keeps of the checkpoint.
    Nothing in the folder changes.

    A repository that is missing is made, `private` or not, and so is the branch `revision`. What an earlier push left
    there is replaced; weights that Secateur did not write are not, except on a new branch or in a pull request
    (`create_pr`), which somebody looks at.

    Raises `CheckpointError` where verification fails, the dense model has no known hub id, a file still names a folder
    of this machine, the repository holds another model, or the hub refuses.
    """
    folder = Path(settings.folder).expanduser()
    local = read_manifest(folder)
    base = known_base(local, settings.base_model, folder)
    with _hub_answers(settings.repository):
        api = signed_in(settings.repository)
        licence = _licence_on_hub(api, base, settings.base_model)
    proof = verify(folder)
    if not proof.ok:
        raise CheckpointError(
            f"{folder}: is not what its manifest says, and was not pushed: {proof.problems[0]}"
            f"{f' ({len(proof.problems)} problems)' if len(proof.problems) > 1 else ''}. See secateur verify {folder}"
        )
    public = published(local, base)
    card = public.source.get("card") or {}
    public.source["card"] = card if card.get("license") else {**licence, **card}
    names, left_out = _files(folder, local)
    contents: dict[str, bytes | Path] = {name: folder / name for name in names}
    if not is_packed(folder):  # whose own record has digests of these files
        _rename_model(contents, public, base)
    records = [] if settings.evaluations is None else settings.evaluations.of(model_digest(folder))
    found = kept_evaluations(records)
    if figures := eval_results(found):
        contents[EVAL_RESULTS] = figures.encode()
    contents[FILE_NAME] = text_of(public.to_json()).encode()
    contents[CARD_FILE] = public_card(folder, local, public, settings.repository, found).encode()
    _check_private(contents, [Path.home(), folder.resolve(), Path(str(local.source.get("path") or ""))])
    message = settings.message or f"{source_name(public)}, pruned with {public.method}"
    with _hub_answers(settings.repository):
        return _committed(api, settings, contents, message, base, left_out, len(found))


def eval_results(found: Sequence[Evaluation]) -> str:
    """What the hub shows of evaluations beside a model, and on the leaderboards of their data sets, as YAML.

    Of tasks, the first metric on all documents; of texts, the perplexity. Only what is a data set of the hub is there.
    """
    import yaml
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries = []
    for item in found:
        result, key = item["result"], item["key"]
        if item["kind"] == "tasks":
            name, metric = next(iter(result["metrics"].items()))
            if result.get("dataset") is None or key.get("limit") is not None or metric["value"] is None:
                continue
            dataset, task = result["dataset"]
            shots = "" if result.get("shots") is None else f", {result['shots']} shots"
            notes = f"{result['task']} of lm-evaluation-harness, {name}{shots}, {result['documents']} documents"
            entries.append(EvalResultEntry(dataset, task, metric["value"], notes=notes))
        elif item["kind"] in ("perplexity", "agreement") and (known := hub_dataset(item)) is not None:
            dataset, config, _ = known
            notes = perplexity_name(result)
            entries.append(EvalResultEntry(dataset, config or "default", result["perplexity"], notes=notes))
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else ""


def push_lines(result: Push) -> "RenderableType":
    """What was published, and how to get it."""
    from rich.text import Text

    verb = "Opened a pull request on" if result.pull_request else "Pushed to"
    lines = [f"{verb} {result.repository}: {len(result.files)} files, made of {result.base_model}.", result.url]
    if result.deleted:
        lines.append(f"Deleted there, since they belong to what was there before: {', '.join(result.deleted)}")
    if result.left_out:
        lines.append(f"Not pushed, since they are no part of the checkpoint: {', '.join(result.left_out)}")
    if not result.evaluations:
        lines.append("The card has no figures yet: secateur eval or compare measure them, and another push adds them.")
    return Text("\n".join(lines))


def known_base(manifest: Manifest, given: str | None, folder: Path) -> str:
    """The hub id of the dense model. Raises `CheckpointError` where nobody knows it, or what is given is none."""
    if given is not None and hub_id(given) != given:
        raise CheckpointError(f"--base-model: got {given}, expected the id of a model on the hub, as in OWNER/NAME.")
    base = given or base_of(manifest)
    if base is None:
        name = last_part(str(manifest.source.get("path") or "")) or "a module in memory"
        raise CheckpointError(
            f"{folder}: was pruned from {name}, which has no known name on the hub, and whoever finds the result there "
            "must know what it is made of. Name the dense model: --base-model OWNER/NAME"
        )
    return base


def signed_in(repository: str) -> "HfApi":
    """The hub's client. Raises `CheckpointError` for a name that is no repository's, and where nobody is signed in."""
    from huggingface_hub import HfApi, get_token

    if hub_id(repository) != repository:
        raise CheckpointError(f"{repository}: not a repository of the hub; expected OWNER/NAME.")
    if get_token() is None:
        raise CheckpointError(f"{repository}: nobody is signed in to the hub here. Run: hf auth login")
    with _hub_answers(repository):
        api = HfApi()
        api.whoami()
    return api


def _licence_on_hub(api: "HfApi", base: str, given: str | None) -> dict[str, Any]:
    """Licence and languages from the card of the dense model on the hub.

    Raises `CheckpointError` where a model that was `given` by name is not there.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        card = api.model_info(base).card_data
    except GatedRepoError:
        return {}
    except RepositoryNotFoundError:
        if given is None:
            return {}
        raise CheckpointError(
            f"--base-model: got {base}, and the hub has no such model, or does not show it."
        ) from None
    return {key: value for key in COPIED if card is not None and (value := card.get(key)) is not None}


def _files(folder: Path, manifest: Manifest) -> tuple[list[str], list[str]]:
    """The files of a checkpoint that was verified, and those in its folder that are no part of it."""
    others = [name for name in paths_below(folder) if name not in (FILE_NAME, CARD_FILE)]
    own = [
        name
        for name in others
        if name in manifest.files or not (harmless(name) or name.startswith("report/")) or LICENCES.fullmatch(name)
    ]
    return own, sorted({name.partition("/")[0] for name in others if name not in own} - {".git", ".cache"})


def _rename_model(contents: dict[str, bytes | Path], public: Manifest, base: str) -> None:
    """Let configurations that remember the folder they were loaded from name the model instead."""
    import hashlib

    for name in list(public.files):
        path = contents[name]
        if not name.endswith(".json") or not isinstance(path, Path) or path.stat().st_size > 1 << 20:
            continue
        text = read_text(path)
        found = re.sub(r'("_?name_or_path":\s*)"(?:[~./\\]|[A-Za-z]:)[^"]*"', rf"\g<1>{json.dumps(base)}", text)
        if found != text:
            contents[name] = found.encode()
            public.files[name] = hashlib.sha256(found.encode()).hexdigest()


def _check_private(contents: dict[str, bytes | Path], private: Sequence[Path]) -> None:
    """Raise `CheckpointError` for a text that still names a folder of this machine."""
    for name, content in contents.items():
        if not name.endswith(TEXTS) or name in ("tokenizer.json", "vocab.json"):  # any text is a token somewhere
            continue
        text = read_text(content) if isinstance(content, Path) else content.decode()
        for path in map(str, private):
            if os.path.isabs(path) and path != os.sep and re.search(rf"{re.escape(path)}(?![\w-]|\.\w)", text):
                advice = "delete it, and a new one is written" if name == CARD_FILE else "take it out"
                raise CheckpointError(f"{name}: names {path}, a folder of this machine. Nothing was pushed; {advice}.")


def _committed(
    api: "HfApi",
    settings: PushSettings,
    contents: dict[str, bytes | Path],
    message: str,
    base: str,
    left_out: list[str],
    evaluations: int,
) -> Push:
    """One commit with all files: a repository never holds the shards of one checkpoint and the manifest of another."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repository, revision = settings.repository, settings.revision
    api.create_repo(repository, private=True if settings.private else None, exist_ok=True)
    new_branch = False
    if revision is not None and not settings.create_pr and not revision.startswith("refs/"):
        new_branch = revision not in {branch.name for branch in api.list_repo_refs(repository).branches}
        api.create_branch(repository, branch=revision, exist_ok=True)
    there = api.model_info(repository, revision=revision)
    names = {file.rfilename for file in there.siblings or ()}
    stale = sorted(name for name in names - set(contents) if not harmless(name) or name == EVAL_RESULTS)
    foreign = [name for name in names if name.endswith(WEIGHTS)] if FILE_NAME not in names else []
    if foreign and not (new_branch or settings.create_pr):
        raise CheckpointError(
            f"{repository}: holds {sorted(foreign)[0]} and no {FILE_NAME}: weights that Secateur did not write. Name "
            "another repository, a new branch (--revision), or open a pull request (--create-pr)."
        )
    commit = api.create_commit(
        repository,
        [
            *(CommitOperationAdd(name, content) for name, content in contents.items()),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=message,
        revision=revision,
        create_pr=settings.create_pr,
        parent_commit=there.sha,
    )
    return Push(
        repository=repository,
        url=str(commit.pr_url or commit.commit_url),
        commit=commit.oid,
        pull_request=commit.pr_url,
        base_model=base,
        files=tuple(sorted(contents)),
        deleted=tuple(stale),
        left_out=tuple(left_out),
        evaluations=evaluations,
    )


@contextmanager
def _hub_answers(repository: str) -> Iterator[None]:
    """Make a `CheckpointError` of whatever the hub's client raises."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except CheckpointError:
        raise
    except OfflineModeIsEnabled:
        raise CheckpointError(
            f"{repository}: offline mode is on (HF_HUB_OFFLINE), and pushing needs the hub. Nothing was pushed."
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        advice = {
            401: "Sign in with a token that may write: hf auth login",
            403: "The token may not write there: make one that may, and give it to hf auth login",
            412: "Somebody else has written to it meanwhile: look at that, and push again.",
        }.get(status or 0, "")
        said = str(error.server_message or error).strip().splitlines()[0].rstrip(".")
        raise CheckpointError(f"{repository}: the hub says: {said}. {advice}".rstrip()) from None
    except (HFValidationError, ValueError) as error:
        raise CheckpointError(f"{repository}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{repository}: the hub cannot be reached ({error}).") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "hf_xet"):
            raise
        raise CheckpointError(f"{repository}: the hub cannot be reached ({error}).") from None
