"""kvd as vLLM's KV connector.

--kv-transfer-config '{"kv_connector": "KvdConnector", "kv_role": "kv_both",
                       "kv_connector_module_path": "kvd_client.adapters.vllm"}'
"""

from kvd_client.adapters.vllm.connector import KvdConnector

__all__ = ["KvdConnector"]
