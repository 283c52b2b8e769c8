"""The templates of all workflows: which one a run follows, how they are kept, and their forecasts."""

from __future__ import annotations

import logging
from collections import OrderedDict

from helium_proxy.workflow.forecast import Forecast
from helium_proxy.workflow.settings import WorkflowSettings
from helium_proxy.workflow.store import TemplateStore
from helium_proxy.workflow.template import Template

_log = logging.getLogger(__name__)
_SAVES_PER_TICK = 2


class Templates:
    """A bounded set of templates over a store; the least recently used leaves."""

    def __init__(self, settings: WorkflowSettings, store: TemplateStore | None) -> None:
        # Mutable state.
        self._settings = settings
        self._store = store
        self._templates: OrderedDict[str, Template] = OrderedDict()  # by key, least recently used first
        self._forecasts: dict[str, Forecast] = {}
        self._dirty: dict[str, float] = {}  # templates to save → when they were last saved or first touched
        self._homes: OrderedDict[tuple[str, str], str] = OrderedDict()  # (tenant, base) → template with that node
        if store is not None:
            self._load(store)

    def __len__(self) -> int:
        return len(self._templates)

    def __repr__(self) -> str:
        return f"<Templates {len(self._templates)}, {len(self._dirty)} to save>"

    def _load(self, store: TemplateStore) -> None:
        loaded: list[tuple[str, Template]] = []
        for key, blob in store.load():
            if len(loaded) >= self._settings.max_templates:
                break
            try:
                loaded.append((key, self._parse(key, blob)))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                _log.warning("stored template %r is not readable: %s", key, error)
        for key, template in reversed(loaded):
            self._templates[key] = template
            for base, _ in template.nodes:
                self.settle(template.tenant, base, key)

    def _parse(self, key: str, blob: bytes) -> Template:
        return Template.load(key, blob, self._settings.max_template_nodes, self._settings.max_static_chars)

    def all(self) -> list[Template]:
        """Most recently used first."""
        return list(reversed(self._templates.values()))

    def peek(self, key: str) -> Template | None:
        return self._templates.get(key)

    def get(self, key: str, workflow: str, tenant: str) -> Template:
        """The template of that key, made when there is none."""
        template = self._templates.get(key)
        if template is None:
            template = self._templates[key] = Template(
                key, workflow, tenant, self._settings.max_template_nodes, self._settings.max_static_chars
            )
            while len(self._templates) > self._settings.max_templates:
                self.drop(next(iter(self._templates)))
        else:
            self._templates.move_to_end(key)
        return template

    def drop(self, key: str) -> None:
        """Forget a template, in the store too."""
        if self._templates.pop(key, None) is None:
            return
        self._forecasts.pop(key, None)
        self._dirty.pop(key, None)
        if self._store is not None:
            self._store.delete(key)

    def home(self, tenant: str, base: str) -> str | None:
        """The template that an untagged call of node `base` was last part of."""
        key = self._homes.get((tenant, base))
        return key if key in self._templates else None

    def settle(self, tenant: str, base: str, key: str) -> None:
        """Remember that node `base` is part of template `key`."""
        self._homes[(tenant, base)] = key
        self._homes.move_to_end((tenant, base))
        while len(self._homes) > 8 * self._settings.max_templates:
            self._homes.popitem(last=False)

    def forecast(self, key: str, now: float) -> Forecast | None:
        """What the template expects, compiled anew at most every `template_refresh_s` times `Forecast.keep`."""
        template = self._templates.get(key)
        if template is None:
            return None
        if template.young:
            return None
        forecast = self._forecasts.get(key)
        if forecast is None or (
            forecast.version != template.version
            and not 0 <= now - forecast.compiled_at < forecast.keep * self._settings.template_refresh_s
        ):
            forecast = self._forecasts[key] = Forecast(template, now)
        return forecast

    def touch(self, key: str, now: float) -> None:
        """An ended run has changed this template: save it some time."""
        if self._store is not None and key in self._templates:
            self._dirty.setdefault(key, now)

    def save(self, now: float, *, everything: bool = False) -> int:
        """Hand changed templates to the store, a few at a time; returns how many."""
        if self._store is None:
            return 0
        due = [
            key
            for key, since in self._dirty.items()
            if everything or not 0 <= now - since < self._settings.save_interval_s
        ]
        for key in due if everything else due[:_SAVES_PER_TICK]:
            del self._dirty[key]
            template = self._templates[key]
            try:
                self._store.save(key, template.dump())
            except Exception:
                _log.exception("template %r was not saved", key)
        return len(due)

    def close(self) -> None:
        """Save everything and close the store."""
        if self._store is not None:
            self.save(0.0, everything=True)
            self._store.close()
