"""The scheduler side of one engine core: a producer, a consumer, or both."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from vllm_datadist_connector import compat
from vllm_datadist_connector.config import ConfigError, ConnectorConfig
from vllm_datadist_connector.duties import Duties, duties_of
from vllm_datadist_connector.kv_groups import describe_groups
from vllm_datadist_connector.labels import Reason
from vllm_datadist_connector.metadata import NOTHING, ONLY_PULLS, StepMetadata
from vllm_datadist_connector.metrics import DataDistStats, SchedulerMeter
from vllm_datadist_connector.protocol.params import wants_remote_decode, was_remote_prefill
from vllm_datadist_connector.scheduler.consumer import ConsumerScheduler
from vllm_datadist_connector.scheduler.identity import InstanceIdentity
from vllm_datadist_connector.scheduler.local_prefills import LocalPrefills
from vllm_datadist_connector.scheduler.producer import ProducerScheduler
from vllm_datadist_connector.scheduler.relief import Relief
from vllm_datadist_connector.side_channel.endpoint import Endpoint, Trust

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


class ConnectorScheduler:
    """Gives each hook to the side whose request it is about."""

    def __init__(
        self,
        config: ConnectorConfig,
        vllm_config: VllmConfig,
        groups: Sequence[Any],
        group_ids: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            groups: the KV cache groups that cross instances.
            group_ids: their numbers in vLLM; None: they are all that there are.

        Raises:
            ConfigError: vLLM's scheduler would go on from wrong KV, whatever a connector brings.
        """
        transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
        identity = InstanceIdentity(
            engine_id=transfer.engine_id,
            tp_size=parallel.tensor_parallel_size,
            pp_size=parallel.pipeline_parallel_size,
            dcp_size=parallel.decode_context_parallel_size,
            groups=describe_groups(groups),
        )
        _check_states(identity, vllm_config)
        self._lease_s, self._decoder_lease_s = config.lease_s, config.decoder_lease_s
        self._bidirectional = config.bidirectional
        self._prompt_tail = compat.prompt_tail(vllm_config, any(group.forgets for group in identity.groups))
        self._meter = SchedulerMeter(identity.engine_id)
        self._local = LocalPrefills(self._meter)
        trust = Trust(config.auth, config.insecure)
        if config.insecure:
            logger.warning("insecure: whoever can connect to %s is a peer, and may read what peers may", config.host)
        self._producer: ProducerScheduler | None = None
        self._consumer: ConsumerScheduler | None = None
        self._duties = duties_of(transfer.kv_role, config)
        if self._duties.gives:
            port = config.side_channel_port
            port += compat.data_parallel_index(parallel) if port else 0
            endpoint = Endpoint(config.host, port)
            self._producer = ProducerScheduler(
                identity,
                endpoint,
                config.lease_limit_s,
                trust,
                config.claim_s,
                group_ids,
                config.lease_s,
                self._meter,
                config.role_switch,
            )
        if self._duties.takes:
            self._consumer = ConsumerScheduler(
                identity.groups,
                config.allows_peer,
                config.recv_deadline_s,
                config.handshake_timeout_s,
                trust,
                config.recompute_threshold if config.bidirectional else None,
                self._prompt_tail,
                (self._producer.endpoint, identity.incarnation) if self._producer is not None else None,
                self._local,
                config.handoff_wait_s,
                config.transfer_mode,
                self._meter,
            )
        self._relief = Relief(self._producer, self._consumer) if self._producer is not None else None
        self._roles = self._producer.roles if self._producer is not None else None
        self._home = self._producer.home if self._producer is not None and self._roles is not None else None
        """Until the ranks have been told."""

    def set_geometries(self, geometries: dict[tuple[int, int], bytes]) -> None:
        if self._producer is not None:
            self._producer.set_geometries(geometries)

    def on_new_request(self, request: Request) -> None:
        params, producer, consumer = request.kv_transfer_params, self._producer, self._consumer
        duties, role = self._present_duties()
        self._local.note_arrival(request.request_id, params, duties, role)
        if self._relief is not None:
            self._relief.arrived(request.request_id)
        if producer is not None:
            is_prefill = wants_remote_decode(params)
            if is_prefill and self._prompt_tail:
                compat.drop_prompt_tail(request, self._prompt_tail)
            if is_prefill or (self._bidirectional and was_remote_prefill(params)):
                producer.on_new_request(request, duties.gives)
        if consumer is not None and duties.takes:
            consumer.on_new_request(request, duties.gives)
            self._tell_taken()

    def _present_duties(self) -> tuple[Duties, str]:
        """And the role by which an operator knows them; empty where it does not change."""
        roles = self._roles
        return (self._duties, "") if roles is None else (Duties(roles.gives, roles.takes), roles.role)

    def _tell_taken(self) -> None:
        """Before the role changes, what was taken is pulled."""
        if self._roles is not None and self._consumer is not None:
            self._roles.set_taken(self._consumer.taken())

    def matched_tokens(self, request: Request, num_computed_tokens: int) -> int | None:
        if self._roles is not None and self._consumer is not None and not self._roles.may_pull:
            self._consumer.prefill_here(request.request_id, (Reason.SWITCHED, "the role changes before its pull began"))
        count = self._consumer.matched_tokens(request, num_computed_tokens) if self._consumer is not None else 0
        if self._relief is not None and count is not None:
            self._relief.asked(request.request_id)
        return count

    def after_alloc(self, request: Request, tables: Sequence[Sequence[int]], num_external_tokens: int) -> None:
        if self._relief is not None:
            self._relief.allocated(request.request_id)
        if self._consumer is not None:
            self._consumer.after_alloc(request, tables, num_external_tokens)

    def request_finished(self, request: Request, tables: Sequence[Sequence[int]]) -> tuple[bool, dict[str, Any] | None]:
        if self._relief is not None:
            self._relief.ended(request.request_id)
        if self._consumer is not None:
            self._consumer.request_finished(request.request_id)
            self._tell_taken()
        if self._producer is None:
            return False, None
        if wants_remote_decode(request.kv_transfer_params):
            gives = self._present_duties()[0].gives
            return self._producer.request_finished(request, tables, self._lease_s, gives=gives)
        if self._bidirectional and was_remote_prefill(request.kv_transfer_params):
            return self._producer.request_finished(request, tables, self._decoder_lease_s, for_next_turn=True)
        return False, None

    def set_paused(self, paused: bool) -> None:
        """vLLM has stopped to schedule requests, or goes on."""
        if self._producer is not None:
            self._producer.set_paused(paused)

    def finished(self, received: Collection[str], sent: Collection[str]) -> None:
        """Every worker rank has told vLLM so."""
        if received and self._consumer is not None:
            self._consumer.received(received)
            self._tell_taken()
        if sent and self._producer is not None:
            self._producer.sent(len(sent))

    def absorb_stats(self, stats: KVConnectorStats) -> None:
        """What the workers have measured in the step."""
        self._meter.absorb(stats)

    def build_step(self, output: SchedulerOutput) -> StepMetadata:
        if self._relief is not None:
            self._relief.step(output.total_num_scheduled_tokens)
        giving = self._producer.step(output) if self._producer is not None else None
        ended = self._producer.take_ended() if self._producer is not None else ()
        left = self._producer.take_left_askers() if self._producer is not None else ()
        pulls, cancels = self._consumer.take_jobs() if self._consumer is not None else ((), ())
        home = self._home
        if self._roles is not None:
            self._tell_taken()
            self._meter.serves(self._roles.role)
            self._home = None
        has_stats = self._meter.has_some()
        only_pulls = (
            not output.total_num_scheduled_tokens and self._consumer is not None and self._consumer.pulling() > 0
        )
        if not (pulls or cancels or ended or left or giving or home or has_stats):
            return ONLY_PULLS if only_pulls else NOTHING
        return StepMetadata(pulls, cancels, ended, left, giving, home, has_stats, only_pulls)

    def take_stats(self) -> DataDistStats | None:
        if self._producer is not None:
            self._producer.hear()
        return self._meter.take()

    def close(self) -> None:
        if self._producer is not None:
            self._producer.close()
        if self._consumer is not None:
            self._consumer.close()


def _check_states(identity: InstanceIdentity, vllm_config: VllmConfig) -> None:
    if any(group.is_state for group in identity.groups) and compat.skips_states(vllm_config):
        raise ConfigError(
            "recompute_scheduler_enable: this scheduler takes a prompt in the prefix cache for one whose state"
            " (Mamba, GDN) is there, too, and answers would be wrong; use --no-enable-prefix-caching, or leave it"
            " out"
        )
