// Streams from several adapters concurrently with a client made by reflection alone, and prints the messages by adapter.
// Arguments: HOST:PORT, adapters.

import grpc from "@grpc/grpc-js";
import reflection from "grpc-js-reflection-client";

const [address, ...adapters] = process.argv.slice(2);
const credentials = grpc.credentials.createInsecure();
const server = new reflection.GrpcReflection(address, credentials);
const service = (await server.listServices()).find((name) => name === "lorarep.v1.GenerationService");
const descriptor = await server.getDescriptorBySymbol(service);
const { lorarep } = descriptor.getPackageObject({ keepCase: true, enums: String, oneofs: true });
const client = new lorarep.v1.GenerationService(address, credentials);

const streamed = adapters.map(async (adapter) => {
  const call = client.generateStream({
    request: {
      prompt: { text: "The capital of France" },
      adapters: [{ name: adapter }],
      stopping: { max_new_tokens: 40, ignore_eos: true },
    },
  });
  return [adapter, await call.toArray()];
});
console.log(JSON.stringify(Object.fromEntries(await Promise.all(streamed))));
process.exit(); // the reflection client keeps its connection
