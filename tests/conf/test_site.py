from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from conf.compose import site_from_yaml
from conf.schema import SettingError
from conf.site import SOURCES, ChannelRule, FilesSource, MatomoDbSource

TEMPLATE = Path(__file__).parents[2] / "client" / "templates" / "site.yaml"

SITE = """\
name: acme
source:
  name: files
  path: a/*.parquet
  columns: {visitor_id: v}
consent: {accepted: ["yes"]}
channels:
  - {channel: email, medium: nl}
"""


def test_what_a_file_says_is_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(SITE)
    site = site_from_yaml(tmp_path / "site.yaml")
    assert site.name == "acme"
    assert isinstance(site.source, FilesSource)
    assert site.source.path == "a/*.parquet"
    assert site.source.columns.visitor_id == "v"
    assert site.source.columns.time == "time"
    assert site.consent.accepted == ["yes"]
    assert site.channels == [ChannelRule(channel="email", medium="nl")]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("path:", "pathh:", "source.pathh: no such setting; did you mean source.path?"),
        ("visitor_id: v", "visitor: v", "source.columns.visitor: no such setting"),
        ("name: files", "name: filez", "source.name=filez: no such choice; did you mean files?"),
        ("name: files", "nam: files", "source.name=None: no such choice"),
        ("source:", "sources:", "source.name=None: no such choice"),
        ("channel: email", "channel: emal", "channels.*.channel=emal: must be one of direct"),
        ("medium: nl", "medium: '('", "channels.*.medium=(: is no regular expression"),
        (", medium: nl", "", "says nothing that a visit can fit"),
        ("medium: nl", "mediun: nl", "mediun: no such setting"),
        ('["yes"]', "[]", "consent.accepted=[]: must name the values that mean consent"),
        ("name: acme\n", "", "missing mandatory value: name"),
        ("  path: a/*.parquet\n", "", "missing mandatory value: path"),
        ("name: acme", "name: ../acme", "name=../acme: must be a letter or digit"),
        ("name: acme", "name: [a]", "name: "),
        ("consent:", "purpose: ''\nconsent:", "purpose=: must not be empty"),
        ("consent:", "preparation: {rotation_days: 7}\nconsent:", "must be at least"),
        ("consent:", "preparation: {campaign_visitors: 0}\nconsent:", "must be above 0"),
        ("  path", "  bad_rows: 1\n  path", "source.bad_rows=1.0: must be in [0, 1)"),
        ("  path", "  batch: 0\n  path", "source.batch=0: must be above 0"),
        ("  path", "  timezone: Mars\n  path", "source.timezone=Mars: is no time zone"),
        ("visitor_id: v", "visitor_id: ''", "source.columns.visitor_id=: must not be empty"),
        ("consent:", "agent: {holdout: 1}\nconsent:", "agent.holdout=1.0: must be between 0 and"),
        ("consent:", "agent: {port: 70000}\nconsent:", "agent.port=70000: must be a port, or 0"),
        (
            "consent:",
            "agent: {users: [node]}\nconsent:",
            "agent.group=: is needed with agent.users",
        ),
        ("consent:", "agent: {group: node}\nconsent:", "agent.group=node: is needed with agent"),
        ("consent:", "agent: {sockt: s}\nconsent:", "agent.sockt: no such setting; did you mean"),
        (SITE, "", "source.name=None"),
        (SITE, "- a", "not a configuration"),
        (SITE, "a: [", "cannot be read, or is not YAML"),
    ],
)
def test_a_mistake_is_named_with_file_and_key(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in SITE
    path = tmp_path / "site.yaml"
    path.write_text(SITE.replace(old, new))
    with pytest.raises(SettingError) as error:
        site_from_yaml(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("prefix: 'x`; DROP'", "letters, digits and underscores"),
        ("database: a.b", "letters, digits and underscores"),
        ("consent_column: user_id", "must be a custom dimension or variable"),
        ("consent_column: location_ip", "must be a custom dimension or variable"),
        ("port: 70000", "must be a port"),
        ("settle_minutes: 0", "must be above 0"),
    ],
)
def test_no_setting_of_the_database_reads_more_than_it_should(
    tmp_path: Path, setting: str, message: str
) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        f"name: acme\nconsent: {{upstream: true}}\n"
        f"source: {{name: matomo_db, user: reader, {setting}}}\n"
    )
    with pytest.raises(SettingError, match=message):
        site_from_yaml(path)


@pytest.mark.parametrize(
    "url", ["ftp://a/", "matomo.example.org", "https://a/?token_auth=s3cret", "https://a/#x"]
)
def test_an_address_that_is_none_or_holds_a_token(tmp_path: Path, url: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        f"name: acme\nconsent: {{upstream: true}}\n"
        f"source: {{name: matomo_api, token_file: t, url: '{url}'}}\n"
    )
    with pytest.raises(SettingError, match="must be an http or https address") as error:
        site_from_yaml(path)
    assert "s3cret" not in str(error.value)


def test_the_template_is_a_site_and_so_is_each_source_that_it_offers(tmp_path: Path) -> None:
    assert isinstance(site_from_yaml(TEMPLATE).source, MatomoDbSource)
    text = TEMPLATE.read_text()
    active = text[text.index("source:\n") : text.index("# source:")]
    offered = [block for block in text.split("\n\n") if block.startswith("# source:")]
    names = ["matomo_db"]
    for block in offered:
        source = "\n".join(line.removeprefix("# ") for line in block.splitlines()) + "\n\n"
        path = tmp_path / "site.yaml"
        path.write_text(text.replace(active, source))
        names.append(yaml.safe_load(source)["source"]["name"])
        assert type(site_from_yaml(path).source) is SOURCES[names[-1]]
    assert set(names) == set(SOURCES) - {"criteo"}
