// Streams from several adapters concurrently with a client of the public messages, and prints the messages by adapter.
// Arguments: HOST:PORT, the public generation.proto, adapters.

import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const [address, proto, ...adapters] = process.argv.slice(2);
const { fmaas } = grpc.loadPackageDefinition(loadSync(proto, { keepCase: true, enums: String, defaults: true }));
const client = new fmaas.GenerationService(address, grpc.credentials.createInsecure());

const streamed = adapters.map(async (adapter) => {
  const call = client.generateStream({
    adapter_id: adapter,
    request: { text: "The capital of France" },
    params: { stopping: { max_new_tokens: 40, min_new_tokens: 40 } },
  });
  return [adapter, await call.toArray()];
});
console.log(JSON.stringify(Object.fromEntries(await Promise.all(streamed))));
client.close();
