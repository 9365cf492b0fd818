"""Open the storage of the Optuna study that workers share: a journal file or a database."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from effnet_fast.credentials import mask_credentials
from effnet_fast.internals import internal

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

JOURNAL = "journal"
RENEWALS = 4  # heartbeats per lease_seconds


def open_storage(folder: Path, storage: str, lease_seconds: float) -> BaseStorage:
    """Open the storage of `--storage`.

    Args:
        folder: the search's folder, which contains the journal.
        storage: `journal`, or a database URL that Optuna accepts.
        lease_seconds: a trial without a heartbeat for this long counts as abandoned.

    Raises:
        ValueError: the URL is wrong, its driver is missing, or the database is unreachable. The message hides the
            URL's password.
    """
    import optuna
    from optuna import storages

    if storage == JOURNAL:
        backend = internal("optuna.storages.journal.JournalFileBackend")
        return storages.JournalStorage(backend(str(folder / "journal.log")))
    advice = (
        "give `journal` or a database URL such as sqlite:///search.db or postgresql://host/name (with its driver "
        "installed)"
    )
    with warnings.catch_warnings(), explain_errors(storage, advice, ImportError, ValueError):
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats are experimental
        return storages.RDBStorage(
            storage,
            heartbeat_interval=max(1, round(lease_seconds / RENEWALS)),
            grace_period=max(1, round(lease_seconds)),
        )


@contextmanager
def explain_errors(storage: str, advice: str, *errors: type[Exception]) -> Iterator[None]:
    """Replace database errors, and the types in `errors`, by a one-line ValueError without the URL's password.

    Raises:
        ValueError: one of these errors occurred.
    """
    try:
        yield
    except (*_database_errors(storage), *errors) as error:
        text = " ".join(str(error).replace(storage, mask_credentials(storage)).split())
        # `from None`: the cause's text in a traceback would contain the password.
        raise ValueError(f"--storage {mask_credentials(storage)}: {mask_credentials(text)[:200]}; {advice}") from None


def _database_errors(storage: str) -> tuple[type[Exception], ...]:
    """Return the exceptions that a failing database raises; none for a journal."""
    if storage == JOURNAL:
        return ()
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return StorageInternalError, SQLAlchemyError


def stale_trial_ids(storage: BaseStorage, study_name: str) -> list[int]:
    """Return the ids of running trials without a recent heartbeat; the storage must have heartbeats.

    Raises:
        ValueError: this version of Optuna cannot list them.
    """
    # Private API: the public fail_stale_trials would also mark these trials as failed.
    list_stale = getattr(storage, "_get_stale_trial_ids", None)
    if list_stale is None:
        import optuna

        raise ValueError(f"Optuna {optuna.__version__} does not list stale trials: pip install 'optuna>=4.2,<6'")
    return list_stale(storage.get_study_id_from_name(study_name))
